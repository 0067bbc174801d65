"""A gate weight times the gradient of TRL's DPO sigmoid loss is the gradient of the method's own loss."""

import pytest
import torch

from dsel_trl.functional.margins import dpo_loss, log_ratio_margin, simpo_margin
from dsel_trl.functional.preference import alpha_dpo, amapo, beta_dpo, dr_dpo, gamma_po, robust_dpo, uni_dpo, wpo
from tests.functional.stock_dpo import random_batch

SCORES = (
    torch.tensor([4.0, 3.0, 5.0, 2.0, 3.5, 4.0], dtype=torch.float64),
    torch.tensor([2.0, 3.0, 1.0, 3.0, float("nan"), 1.0], dtype=torch.float64),
)


@pytest.fixture(params=[0, 1])
def batch(request):
    return random_batch(request.param)


def same(batch, weights, loss):
    weighted, direct = batch.stock_gradient(weights), batch.gradient(loss)
    assert direct.abs().max() > 0
    torch.testing.assert_close(weighted, direct, rtol=1e-9, atol=1e-12)


def row_arguments(batch):
    return (*batch.lengths, batch.beta * batch.margin(), batch.beta)


def test_beta_dpo(batch):
    mask = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    same(batch, beta_dpo.kept_mean_weights(mask), lambda t: dpo_loss(batch.beta * batch.margin(t))[mask > 0].mean())


def test_gamma_po_dpo_form(batch):
    gaps = batch.beta * batch.margin()
    margins = gamma_po.target_margins(gaps, gamma0=0.8, tau=1.0)
    assert margins.std() > 1e-3
    weights = gamma_po.gamma_po_gate_weight(gaps, margins, gamma0=0.8)
    same(batch, weights, lambda t: gamma_po.gamma_po_loss(batch.beta * batch.margin(t), margins, 0.8).mean())


def test_gamma_po_simpo_form(batch):
    beta = 2.5
    gaps = simpo_margin(*batch.averages(), beta)
    margins = gamma_po.target_margins(gaps, gamma0=1.0, tau=3.0)
    weights = gamma_po.gamma_po_gate_rows(gaps, margins, beta, *row_arguments(batch))
    same(batch, weights, lambda t: gamma_po.gamma_po_loss(simpo_margin(*batch.averages(t), beta), margins).mean())


def test_alpha_dpo(batch):
    ratio = log_ratio_margin(*batch.averages(), *batch.reference_averages())
    margin = alpha_dpo.alpha_margin(ratio, float(ratio.mean()), float(ratio.std()))
    weights = alpha_dpo.alpha_dpo_gate_rows(*batch.averages(), margin, 2.5, *row_arguments(batch))
    same(batch, weights, lambda t: alpha_dpo.alpha_dpo_loss(*batch.averages(t), margin, 2.5).mean())


def test_amapo(batch):
    def gap(tokens=None):
        chosen, rejected = batch.averages(tokens)
        return chosen - rejected

    margin = amapo.amapo_margin(gap())
    assert (margin > 0).any()
    weights = amapo.amapo_gate_rows(gap(), margin, 3.0, *row_arguments(batch))
    same(batch, weights, lambda t: amapo.amapo_loss(gap(t), margin, 3.0).mean())


@pytest.mark.parametrize("detach_weight", [False, True])
def test_uni_dpo(batch, detach_weight):
    options = {"beta": 2.0, "tau_good": 3.2, "nll_lambda": 0.05, "detach_weight": detach_weight}
    reference = batch.reference_averages()
    indicator = uni_dpo.likelihood_indicator(batch.averages()[0], reference[0], SCORES[0])
    assert 0 < indicator.sum() < len(indicator)
    weights = uni_dpo.uni_dpo_gate_rows(*batch.averages(), *reference, *SCORES, *row_arguments(batch), **options)
    same(batch, weights, lambda t: uni_dpo.uni_dpo_loss(*batch.averages(t), *reference, *SCORES, **options).mean())


@pytest.mark.parametrize("kind", ["robust", "conservative"])
def test_label_noise_losses(batch, kind):
    loss, gate = getattr(robust_dpo, f"{kind}_loss"), getattr(robust_dpo, f"{kind}_gate_weight")
    weights = gate(batch.beta * batch.margin(), 0.2)
    same(batch, weights, lambda t: loss(batch.beta * batch.margin(t), 0.2).mean())
    torch.testing.assert_close(gate(batch.beta * batch.margin(), 0.0), torch.ones_like(batch.margin()))


def test_clean_posterior_weights_the_loss(batch):
    weights = robust_dpo.clean_posterior(batch.beta * batch.margin(), 0.2)
    same(batch, weights, lambda t: (weights * dpo_loss(batch.beta * batch.margin(t))).mean())


def test_dr_dpo_weights_have_the_gradient_of_the_aggregate(batch):
    weights = dr_dpo.dr_dpo_weights(dpo_loss(batch.beta * batch.margin()), 0.7)
    same(batch, weights, lambda t: dr_dpo.dr_dpo_aggregate(dpo_loss(batch.beta * batch.margin(t)), 0.7))


def test_wpo_weights_the_loss(batch):
    generator = torch.Generator().manual_seed(5)
    expected = -torch.rand(batch.tokens.shape, generator=generator, dtype=torch.float64)
    weights = wpo.wpo_pair_weight(*wpo.aligned_logps(batch.tokens, expected, batch.mask).chunk(2))
    same(batch, weights, lambda t: (weights * dpo_loss(batch.beta * batch.margin(t))).mean())
