"""The losses of KTO: values by hand, the two sides, and the KL term."""

import math

import pytest
import torch

from dsel_trl.functional.kto_losses import KTO_LOSSES, kto_losses

RATIOS = torch.tensor([2.0, -3.0, 0.5, 40.0])
LABELS = torch.tensor([True, True, False, False])


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_values_by_hand():
    losses = kto_losses("kto", RATIOS, LABELS, 1.5, beta=0.2, desirable_weight=0.7, undesirable_weight=1.3)
    expected = [0.7 * (1 - sigmoid(0.2 * (r - 1.5))) for r in (2.0, -3.0)]
    expected += [1.3 * (1 - sigmoid(0.2 * (1.5 - r))) for r in (0.5, 40.0)]
    torch.testing.assert_close(losses, torch.tensor(expected))
    losses = kto_losses("apo_zero_unpaired", RATIOS, LABELS, 1.5, beta=0.2)
    expected = [1 - sigmoid(0.2 * r) for r in (2.0, -3.0)] + [sigmoid(0.2 * r) for r in (0.5, 40.0)]
    torch.testing.assert_close(losses, torch.tensor(expected))


@pytest.mark.parametrize("loss_type", KTO_LOSSES)
def test_a_turned_label_mirrors_the_loss(loss_type):
    losses = [kto_losses(loss_type, RATIOS, labels, 0.4) for labels in (LABELS, ~LABELS)]
    torch.testing.assert_close(sum(losses), torch.ones(4))


def test_what_the_policy_is_sure_of_keeps_its_digits():
    """A loss near zero is no rounding of 1 - 1."""
    assert kto_losses("kto", torch.tensor([300.0]), torch.tensor([True])).item() == pytest.approx(math.exp(-30.0))


def test_an_unknown_loss():
    with pytest.raises(ValueError, match="loss_type='bco' is none of"):
        kto_losses("bco", RATIOS, LABELS)
