import numpy as np
import pytest

from dsel_trl.functional.order.token_budget import budget_starts, sorted_windows
from tests.functional.order.padding import padded_tokens

LENGTHS = np.random.default_rng(0).integers(0, 500, size=1234)


def batches_of(lengths, budget, seed=0, window=4096, **options):
    lengths = np.asarray(lengths)
    order = sorted_windows(lengths, np.random.default_rng(seed).permutation(len(lengths)), window)
    return np.split(order, budget_starts(lengths[order], budget, window, **options)[1:])


def test_windows_by_hand():
    assert sorted_windows([1, 5, 3, 4, 9], [0, 1, 2, 3, 4], 2).tolist() == [1, 0, 3, 2, 4]
    assert sorted_windows([2, 2, 2], [2, 0, 1], 3).tolist() == [2, 0, 1]


@pytest.mark.parametrize("window", [1, 7, 64, 5000])
@pytest.mark.parametrize("rows", [1, 2])
def test_every_id_once_within_the_budget(window, rows):
    batches = batches_of(LENGTHS, 2048, 1, window=window, rows_per_example=rows)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(LENGTHS)))
    assert padded_tokens(batches, LENGTHS, rows_per_example=rows).max() <= 2048
    assert all((np.diff(LENGTHS[batch]) <= 0).all() for batch in batches)


def test_batches_are_as_large_as_the_budget_allows():
    batches = batches_of(np.full(100, 10), 65, 0, window=50)
    assert sorted(map(len, batches)) == [2] * 2 + [6] * 16
    capped = batches_of(np.full(100, 10), 65, 0, window=50, max_examples=5)
    assert {len(batch) for batch in capped} == {5}


def test_an_example_above_the_budget_is_alone():
    batches = batches_of([100, 5, 5], 10, 0)
    assert sorted(batch.tolist() for batch in batches if 0 in batch) == [[0]]
    assert padded_tokens(batches, [100, 5, 5]).tolist().count(10) == 1


def test_larger_windows_pad_less():
    def padding(window):
        return padded_tokens(batches_of(LENGTHS, 4096, 0, window=window), LENGTHS).sum()

    assert LENGTHS.sum() < padding(1000) < padding(100) < padding(32)


def test_a_batch_of_several_ranks_holds_as_much_for_each():
    one, two = (budget_starts(np.full(40, 10), 65, 40, ranks=ranks).tolist() for ranks in (1, 2))
    assert one == list(range(0, 40, 6))
    assert two == list(range(0, 40, 12))


def test_no_examples():
    assert sorted_windows([], [], 8).tolist() == []
    assert budget_starts([], 10, 8).tolist() == []
