import numpy as np
import pytest
import torch
from transformers.trainer_pt_utils import get_length_grouped_indices

from dsel_trl.functional.order.length_grouped import length_grouped_order, mega_batch_multiplier


def test_by_hand():
    assert length_grouped_order([1, 2, 3, 4], 1, [0, 1, 2, 3], mega_batch_mult=2).tolist() == [3, 0, 1, 2]


@pytest.mark.parametrize("n", [1, 2, 7, 50, 333])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_equals_transformers(n, batch_size):
    lengths = np.random.default_rng(n).integers(1, 9, size=n)
    permutation = torch.randperm(n, generator=torch.Generator().manual_seed(3))
    expected = get_length_grouped_indices(lengths.tolist(), batch_size, generator=torch.Generator().manual_seed(3))
    got = length_grouped_order(lengths, batch_size, permutation.numpy())
    assert got.tolist() == expected
    assert lengths[got[0]] == lengths.max()
    assert sorted(got.tolist()) == list(range(n))


def test_multiplier():
    assert mega_batch_multiplier(3, 8) == 1
    assert mega_batch_multiplier(800, 8) == 25
    assert mega_batch_multiplier(10**6, 8) == 50


def test_no_examples():
    assert length_grouped_order([], 4, []).tolist() == []


def test_errors_name_the_value():
    with pytest.raises(ValueError, match=r"\(2,\).*\(3,\)"):
        length_grouped_order([1, 2, 3], 2, [0, 1])
    with pytest.raises(ValueError, match="batch_size"):
        length_grouped_order([1], 0, [0])
    with pytest.raises(ValueError, match="mega_batch_mult"):
        length_grouped_order([1], 1, [0], mega_batch_mult=0)
