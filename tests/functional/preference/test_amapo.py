import math

import pytest
import torch

from dsel_trl.functional.preference.amapo import amapo_loss, amapo_margin


def test_margin_by_hand():
    # mean 1, deviation sqrt(2)
    margin = amapo_margin(torch.tensor([0.0, 2.0]), beta=3.0)
    torch.testing.assert_close(margin, torch.tensor([3 * math.exp(1 / math.sqrt(2)), 0.0]))


def test_only_pairs_below_the_mean_get_a_margin_and_a_negative_mean_turns_the_order():
    gap = torch.tensor([-3.0, -2.0, -1.0, 1.0])
    margin = amapo_margin(gap)
    assert (margin > 0).tolist() == [True, True, False, False]
    assert margin[0] < margin[1]
    margin = amapo_margin(gap + 10)
    assert margin[0] > margin[1]


@pytest.mark.parametrize("gap", [[1.5], [0.1, 0.1, 0.1]])
def test_no_deviation_means_no_margin(gap):
    assert amapo_margin(torch.tensor(gap)).tolist() == [0.0] * len(gap)


def test_the_exponent_is_limited():
    gap = torch.tensor([0.0, 1000.0, 1000.0])
    assert amapo_margin(gap, beta=1.0)[0].item() == pytest.approx(math.exp(10.0))
    assert amapo_margin(gap, beta=1.0, max_exponent=None)[0].isinf()


def test_loss():
    assert amapo_loss(torch.tensor([0.5]), torch.tensor([1.5]), beta=3.0).item() == pytest.approx(math.log(2.0))
