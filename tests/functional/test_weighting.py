import math

import pytest
import torch

from dsel_trl.functional.weighting import (
    effective_sample_size,
    length_normalized_gate_rows,
    normalize_weights,
    shifted_gate_weight,
    slope_gate_weight,
)


def test_normalisation():
    weights = torch.tensor([1.0, 3.0, 0.0, math.nan])
    assert normalize_weights(weights, "mean1").tolist() == [1.0, 3.0, 0.0, 0.0]
    assert normalize_weights(weights, "sum1").tolist() == [0.25, 0.75, 0.0, 0.0]
    assert normalize_weights(weights, "none").tolist() == [1.0, 3.0, 0.0, 0.0]


def test_all_zero_weights_become_uniform():
    zeros = torch.zeros(4)
    assert normalize_weights(zeros, "mean1").tolist() == [1.0] * 4
    assert normalize_weights(zeros, "sum1").tolist() == [0.25] * 4
    assert normalize_weights(zeros, "none").tolist() == [0.0] * 4
    assert normalize_weights(torch.tensor([]), "mean1").tolist() == []


def test_huge_and_tiny_weights_survive_normalisation():
    assert normalize_weights(torch.tensor([3e38, 3e38, 0.0])).tolist() == pytest.approx([1.5, 1.5, 0.0])
    torch.testing.assert_close(normalize_weights(torch.tensor([1e-40, 1e-40])), torch.ones(2), rtol=1e-3, atol=0)


def test_normalisation_detaches_and_names_an_unknown_mode():
    assert not normalize_weights(torch.ones(2, requires_grad=True)).requires_grad
    with pytest.raises(ValueError, match="'mean'"):
        normalize_weights(torch.ones(2), "mean")


def test_effective_sample_size():
    assert effective_sample_size(torch.ones(8)) == 8
    assert effective_sample_size(torch.tensor([5.0, 0.0, 0.0])) == 1
    assert effective_sample_size(torch.tensor([1.0, 2.0])).item() == pytest.approx(9 / 5)
    assert effective_sample_size(torch.zeros(3)) == 0
    assert effective_sample_size(torch.tensor([1e30, 1e30])) == 2


def test_no_shift_and_the_stock_slope_are_weight_one():
    margin = torch.tensor([-50.0, -1.0, 0.0, 2.0, 50.0])
    assert shifted_gate_weight(margin, 0.0).tolist() == [1.0] * 5
    torch.testing.assert_close(slope_gate_weight(torch.sigmoid(-margin), margin), torch.ones(5))


def test_weights_stay_finite_where_the_stock_gradient_vanishes():
    margin = torch.tensor([500.0])
    assert torch.isfinite(slope_gate_weight(torch.tensor([1.0]), margin)).all()
    assert torch.isfinite(shifted_gate_weight(margin, 1000.0)).all()
    with pytest.raises(ValueError, match=r"0\.0"):
        length_normalized_gate_rows(margin, margin, margin, margin, margin, 0.0)
