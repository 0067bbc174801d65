import math

import pytest
import torch

from dsel_trl.functional.preference.dr_dpo import dr_dpo_aggregate, dr_dpo_weights

LOSSES = torch.tensor([0.2, 0.7, 3.0], dtype=torch.float64)


def test_weights_by_hand():
    losses = torch.tensor([0.0, math.log(3.0)])
    torch.testing.assert_close(dr_dpo_weights(losses, normalize="sum1"), torch.tensor([0.75, 0.25]))
    torch.testing.assert_close(dr_dpo_weights(losses), torch.tensor([1.5, 0.5]))
    assert dr_dpo_aggregate(losses).item() == pytest.approx(-math.log((1 + 1 / 3) / 2))


def test_temperature_limits():
    torch.testing.assert_close(dr_dpo_weights(LOSSES, 1e9), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(dr_dpo_aggregate(LOSSES, math.inf), LOSSES.mean())
    torch.testing.assert_close(dr_dpo_weights(LOSSES, 1e-3), torch.tensor([3.0, 0.0, 0.0], dtype=torch.float64))
    with pytest.raises(ValueError, match="0"):
        dr_dpo_weights(LOSSES, 0.0)


def test_one_pair_is_the_plain_loss():
    assert dr_dpo_aggregate(LOSSES[:1]).item() == pytest.approx(0.2)
    assert dr_dpo_weights(LOSSES[:1]).tolist() == [1.0]


def test_large_losses_do_not_overflow_unless_asked():
    large = torch.tensor([900.0, 950.0])
    assert dr_dpo_aggregate(large).item() == pytest.approx(900 + math.log(2))
    assert dr_dpo_aggregate(large, literal=True).isinf()


def test_nan_losses_weigh_nothing():
    losses = torch.tensor([0.2, math.nan, 0.2])
    assert dr_dpo_weights(losses).tolist() == [1.0, 0.0, 1.0]
    assert dr_dpo_aggregate(losses).item() == pytest.approx(0.2)


def test_without_a_finite_loss_nothing_weighs():
    assert dr_dpo_weights(torch.tensor([math.nan, math.inf])).tolist() == [0.0, 0.0]
    assert dr_dpo_aggregate(torch.tensor([math.nan])).isnan()


@pytest.mark.parametrize("count", [3, 5, 7, 49])
def test_equal_losses_weigh_exactly_alike(count):
    assert dr_dpo_weights(torch.full((count,), 0.7), 0.3).unique().numel() == 1
