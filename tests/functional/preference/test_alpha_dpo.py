import math

import pytest
import torch

from dsel_trl.functional.preference.alpha_dpo import alpha_dpo_loss, alpha_margin


def test_margin_by_hand():
    margin = alpha_margin(torch.tensor([1.0, 3.0]), mean=1.0, std=2.0, alpha=0.2, gamma_ratio=0.6)
    torch.testing.assert_close(margin, torch.tensor([0.6, 0.8]))


@pytest.mark.parametrize("std", [0.0, math.nan])
def test_without_a_deviation_the_margin_is_that_of_simpo(std):
    assert alpha_margin(torch.tensor([5.0, 1.0]), 0.0, std, gamma_ratio=0.5).tolist() == [0.5, 0.5]


def test_a_batch_of_one_has_the_margin_of_simpo_whatever_came_before():
    assert alpha_margin(torch.tensor([5.0]), 0.0, 1.0, gamma_ratio=0.5).tolist() == [0.5]
    assert alpha_margin(torch.tensor([5.0, math.nan]), 0.0, 1.0, gamma_ratio=0.5).tolist() == [0.5, 0.5]


def test_alpha_zero_is_simpo_and_nan_takes_the_base_margin():
    assert alpha_margin(torch.tensor([5.0, -2.0]), 0.0, 1.0, alpha=0.0, gamma_ratio=0.5).tolist() == [0.5, 0.5]
    margin = alpha_margin(torch.tensor([math.nan, 1.0, 0.0]), 0.0, 1.0, alpha=0.2, gamma_ratio=0.5)
    torch.testing.assert_close(margin, torch.tensor([0.5, 0.7, 0.5]))


def test_loss_by_hand_with_a_constant_margin():
    chosen, rejected = torch.tensor([-1.0], requires_grad=True), torch.tensor([-1.5])
    margin = torch.tensor([0.3], requires_grad=True)
    loss = alpha_dpo_loss(chosen, rejected, margin, beta=2.5)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-0.5)))
    loss.backward()
    assert margin.grad is None
