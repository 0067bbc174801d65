import math

import pytest
import torch

from dsel_trl.functional.margins import dpo_loss
from dsel_trl.functional.preference.robust_dpo import (
    clean_posterior,
    conservative_gradient,
    conservative_loss,
    estimate_flip_rate,
    robust_gradient,
    robust_loss,
)

MARGIN = torch.tensor([-3.0, -0.2, 0.0, 1.5, 6.0], dtype=torch.float64)


@pytest.mark.parametrize("loss", [robust_loss, conservative_loss])
def test_no_flips_is_dpo(loss):
    torch.testing.assert_close(loss(MARGIN, 0.0), dpo_loss(MARGIN))


def test_the_robust_loss_is_unbiased():
    eps = 0.2
    torch.testing.assert_close(
        (1 - eps) * robust_loss(MARGIN, eps) + eps * robust_loss(-MARGIN, eps), dpo_loss(MARGIN)
    )


@pytest.mark.parametrize(
    ("loss", "gradient"), [(robust_loss, robust_gradient), (conservative_loss, conservative_gradient)]
)
def test_gradients_are_those_of_the_losses(loss, gradient):
    margin = MARGIN.clone().requires_grad_()
    loss(margin, 0.15).sum().backward()
    torch.testing.assert_close(gradient(margin, 0.15), margin.grad)


def test_the_conservative_loss_rests_at_its_optimum():
    optimum = torch.tensor([math.log(0.9 / 0.1)], dtype=torch.float64)
    assert conservative_gradient(optimum, 0.1).abs().item() < 1e-12


def test_posterior():
    assert clean_posterior(torch.zeros(1), 0.1).item() == pytest.approx(0.9)
    assert clean_posterior(torch.tensor([-math.log(9.0)]), 0.1).item() == pytest.approx(0.5)
    assert clean_posterior(torch.tensor([-1e4, 1e4, math.nan]), 0.1).tolist() == [0.0, 1.0, 0.0]
    assert clean_posterior(torch.tensor([-1e4, math.nan]), 0.0).tolist() == [1.0, 0.0]


def test_flip_rate_estimate_is_clipped():
    assert estimate_flip_rate(torch.tensor([0.9, 0.7, math.nan])) == pytest.approx(0.2)
    assert estimate_flip_rate(torch.ones(3)) == 0.01
    assert estimate_flip_rate(torch.zeros(3)) == 0.45
    with pytest.raises(ValueError, match="among 1"):
        estimate_flip_rate(torch.tensor([math.nan]))


@pytest.mark.parametrize("eps", [0.5, -0.1, 0.9])
@pytest.mark.parametrize("function", [robust_loss, conservative_loss, robust_gradient, clean_posterior])
def test_the_flip_rate_is_checked(function, eps):
    with pytest.raises(ValueError, match=str(eps)):
        function(MARGIN, eps)
