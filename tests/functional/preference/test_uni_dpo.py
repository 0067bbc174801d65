import math

import pytest
import torch

from dsel_trl.functional.preference.uni_dpo import (
    likelihood_indicator,
    performance_weight,
    quality_weight,
    uni_dpo_loss,
)


def test_quality_weight():
    weights = quality_weight(torch.tensor([4.0, 2.0, math.nan]), torch.tensor([2.0, 2.0, 1.0]))
    torch.testing.assert_close(weights, torch.tensor([1 / (1 + math.exp(-1.4)), 0.5, 0.5]))


def test_performance_weight_falls_with_the_margin():
    weights = performance_weight(torch.tensor([-1.0, -0.5, -1.0]), torch.tensor([-1.4, -1.0, -9.0]))
    # 2 * 0.4 - 0.8 = 0: one half to the power of 3
    assert weights[0].item() == pytest.approx(0.125)
    assert weights[0] > weights[1] > weights[2]
    assert performance_weight(torch.zeros(1), torch.zeros(1), gamma=0.0).item() == 1.0


def test_indicator_is_strict_in_the_logps_and_not_in_the_score():
    policy, reference = torch.tensor([-2.0, -1.0, -2.0, -2.0]), torch.tensor([-1.0, -1.0, -1.0, -1.0])
    scores = torch.tensor([3.2, 5.0, 3.0, math.nan])
    assert likelihood_indicator(policy, reference, scores, tau_good=3.2).tolist() == [1.0, 0.0, 0.0, 0.0]


def test_loss_by_hand():
    logps = [torch.tensor([value]) for value in (-1.0, -1.4, -0.5, -0.9)]
    loss = uni_dpo_loss(*logps, torch.tensor([4.0]), torch.tensor([4.0]), nll_lambda=0.1)
    # w_q = 1/2, w_p = 1/8, equal log-ratios: log 2; the chosen answer has lost likelihood: -0.1 * -1
    assert loss.item() == pytest.approx(math.log(2) / 16 + 0.1)


def test_detaching_the_weight_changes_the_gradient_only():
    def run(detach):
        chosen = torch.tensor([-1.0], requires_grad=True)
        others = (torch.tensor([-1.4]), torch.tensor([-1.1]), torch.tensor([-1.0]))
        loss = uni_dpo_loss(chosen, *others, torch.tensor([4.0]), torch.tensor([1.0]), detach_weight=detach)
        loss.sum().backward()
        return loss.item(), chosen.grad.item()

    (value, gradient), (detached_value, detached_gradient) = run(False), run(True)
    assert value == detached_value
    assert gradient < detached_gradient < 0
