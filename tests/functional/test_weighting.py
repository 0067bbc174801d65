import math

import pytest
import torch

from dsel_trl.functional.weighting import (
    effective_sample_size,
    length_normalized_gate_rows,
    shifted_gate_weight,
    slope_gate_weight,
    slopes,
)


def test_effective_sample_size():
    assert effective_sample_size(torch.ones(8)) == 8
    assert effective_sample_size(torch.tensor([5.0, 0.0, 0.0])) == 1
    assert effective_sample_size(torch.tensor([1.0, 2.0])).item() == pytest.approx(9 / 5)
    assert effective_sample_size(torch.zeros(3)) == 0
    assert effective_sample_size(torch.tensor([1e30, 1e30])) == 2
    assert effective_sample_size(torch.tensor([3.0, 3.0, math.nan])) == 2
    assert effective_sample_size(torch.tensor([-2.0, -2.0])) == 2
    assert not effective_sample_size(torch.ones(2, requires_grad=True)).requires_grad


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


def test_slopes_are_derivatives_also_where_gradients_are_off():
    x, y = torch.tensor([1.0, -2.0, math.nan]), torch.tensor([3.0, 5.0, 1.0])
    with torch.no_grad():
        by_x, by_y = slopes(lambda a, b: a**2 * b, x, y)
    torch.testing.assert_close(by_x, 2 * x * y, equal_nan=True)
    torch.testing.assert_close(by_y, x**2, equal_nan=True)
    assert not by_x.requires_grad
    assert slopes(lambda a: a.sum() ** 2, torch.ones(2, dtype=torch.bfloat16))[0].tolist() == [4.0, 4.0]
