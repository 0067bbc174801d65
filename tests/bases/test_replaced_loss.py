"""The methods that train a loss of their own: the gradient they give a live run is that loss's."""

import numpy as np
import pytest
import torch

from dsel_trl import SelectionCallback, create_method
from dsel_trl.functional.margins import log_ratio_margin, simpo_margin
from dsel_trl.functional.preference import alpha_dpo, amapo, gamma_po, uni_dpo
from dsel_trl.functional.running import EmaMoments, ema_update
from tests.methods import live


def uni(logps, batch):
    scores = batch.column("score_chosen"), batch.column("score_rejected")
    return uni_dpo.uni_dpo_loss(*logps.averages, *scores, beta=2.5, nll_lambda=0.3, tau_good=0.5).mean()


def alpha(logps, batch):
    q = log_ratio_margin(*logps.averages)
    moments = ema_update(EmaMoments(), q)
    target = alpha_dpo.alpha_margin(q, moments.mean, moments.std, alpha=0.5, gamma_ratio=0.3)
    return alpha_dpo.alpha_dpo_loss(*logps.averages[:2], target, beta=2.5).mean()


def gamma(form):
    def loss(logps, batch):
        simpo = form == "simpo"
        gaps = simpo_margin(*logps.averages[:2], 2.5) if simpo else 0.3 * logps.margin
        gamma0 = 0.4 * (2.5 if simpo else 0.3)
        margins = gamma_po.target_margins(gaps, gamma0, 0.05)
        assert margins.std() > 0.01 * gamma0
        return gamma_po.gamma_po_loss(gaps, margins, 0.0 if simpo else gamma0).mean()

    return loss


def ama(logps, batch):
    gap = logps.averages[0] - logps.averages[1]
    return amapo.amapo_loss(gap, amapo.amapo_margin(gap, 3.0), 3.0).mean()


FORMS = {
    "uni_dpo": ("uni_dpo", {"beta": 2.5, "nll_weight": 0.3, "tau_good": 0.5}, uni),
    "alpha_dpo": ("alpha_dpo", {"alpha": 0.5, "gamma_ratio": 0.3}, alpha),
    "gamma_po-simpo": ("gamma_po", {"tau": 0.05}, gamma("simpo")),
    "gamma_po-dpo": ("gamma_po", {"form": "dpo", "tau": 0.05}, gamma("dpo")),
    "amapo": ("amapo", {}, ama),
}


@pytest.mark.parametrize("config", [{}, {"precompute_ref_log_probs": True}], ids=["ref", "precomputed"])
@pytest.mark.parametrize(("name", "parameters", "loss"), FORMS.values(), ids=FORMS)
def test_the_gradient_is_that_of_the_own_loss(make_trainer, name, parameters, loss, config):
    trainer, _, gradient, batches = live.one_step(make_trainer, name, config={"beta": 0.3, **config}, **parameters)
    live.assert_same_gradient(gradient, live.own_gradient(trainer, batches, loss))


@pytest.mark.parametrize(("name", "parameters", "loss"), FORMS.values(), ids=FORMS)
def test_it_is_not_that_of_plain_dpo(make_trainer, name, parameters, loss):
    """What the test above compares is different from the gradient that the trainer's own loss has."""
    trainer, _, gradient, batches = live.one_step(make_trainer, name, config={"beta": 0.3}, **parameters)
    plain = live.own_gradient(
        trainer, batches, lambda logps, _: torch.nn.functional.softplus(-0.3 * logps.margin).mean()
    )
    with pytest.raises(AssertionError):
        live.assert_same_gradient(gradient, plain, rtol=1e-2)


def test_alpha_zero_is_simpo(make_trainer):
    trainer, _, gradient, batches = live.one_step(make_trainer, "alpha_dpo", alpha=0.0, gamma_ratio=0.4)

    def simpo(logps, batch):
        return torch.nn.functional.softplus(-(simpo_margin(*logps.averages[:2], 2.5) - 0.4 * 2.5)).mean()

    live.assert_same_gradient(gradient, live.own_gradient(trainer, batches, simpo))


def test_with_accumulation_the_micro_batches_count_alike(make_trainer):
    config = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 3}
    trainer, _, gradient, batches = live.one_step(make_trainer, "amapo", config=config)
    assert len(batches) == 2
    live.assert_same_gradient(gradient, live.own_gradient(trainer, batches, ama))


@pytest.mark.parametrize("name", ["alpha_dpo", "gamma_po"])
def test_running_state_survives_a_resume(make_trainer, tmp_path, name):
    (whole, trace), (resumed, resumed_trace) = live.resumed_state(make_trainer, name, tmp_path)
    assert whole.keys() == resumed.keys()
    for key in whole:
        np.testing.assert_array_equal(whole[key], resumed[key])
    resumed_trace.assert_ends_as(trace)


def test_gamma_po_remembers_every_gap(make_trainer):
    trainer = make_trainer("dpo", max_steps=3, per_device_train_batch_size=4)
    method = create_method("gamma_po")
    SelectionCallback(trainer, method)
    trainer.train()
    assert len(method.state_dict()["gaps"]) == 12


@pytest.mark.parametrize("name", ["uni_dpo", "alpha_dpo", "gamma_po", "amapo"])
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"loss_type": "ipo"}, "ipo"),
        ({"ld_alpha": 0.5}, "ld_alpha"),
        ({"f_divergence_type": "js_divergence"}, "js_divergence"),
        ({"loss_weights": [2.0]}, "loss_weights"),
    ],
    ids=["ipo", "ld", "f_divergence", "weights"],
)
def test_other_losses_are_refused_before_the_first_step(make_trainer, name, config, message):
    trainer = make_trainer("dpo", max_steps=1, **config)
    SelectionCallback(trainer, name)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


def test_two_losses_of_their_own_are_refused(make_trainer):
    with pytest.raises(ValueError, match="loss of their own"):
        SelectionCallback(make_trainer("dpo"), ["beta_dpo", "amapo"])


def test_uni_dpo_missing_scores_count_half(make_trainer):
    from tests import tiny

    dataset = tiny.preferences()
    scores = np.array(dataset["score_chosen"])
    scores[1:] = np.nan
    dataset = dataset.remove_columns("score_chosen").add_column("score_chosen", scores)
    _, method, _, batches = live.one_step(
        make_trainer, "uni_dpo", config={"dataset": dataset}, gamma=0.0, nll_weight=0.0
    )
    known = torch.from_numpy(np.isin(batches[0].ids.numpy(), [0]))
    assert ((method.score(batches[0]) == 0.5) == ~known).all()
