"""beta-DPO in a live run: the batch's own beta, the pairs it leaves out, and the trainer's beta afterwards."""

import numpy as np
import pytest
import torch

from dsel_trl.functional.margins import dpo_loss
from dsel_trl.functional.running import EmaMoments, ema_update
from tests import tiny
from tests.methods import live


def test_the_gradient_is_that_of_the_kept_pairs_with_the_batch_beta(make_trainer):
    trainer, method, gradient, batches = live.one_step(make_trainer, "beta_dpo", keep=0.7, a=5.0)
    (batch,) = batches
    margins = batch.log_ratio_margin
    kept = method.weigh(batch) > 0
    assert int(kept.sum()) == 4
    used = max(0.1 * (1 + 5.0 * float(margins[kept].mean() - margins.mean())), 1e-3)
    assert abs(used - 0.1) > 1e-3

    def loss(logps, _):
        return dpo_loss(used * logps.margin)[kept].mean()

    live.assert_same_gradient(gradient, live.own_gradient(trainer, batches, loss))
    assert trainer.beta == 0.1
    assert trainer.state.log_history[0]["selection/beta_dpo_beta"] == pytest.approx(used)


def test_it_adjusts_other_losses_too(make_trainer):
    config = {"loss_type": "hinge", "beta": 1.0}
    trainer, _, gradient, batches = live.one_step(make_trainer, "beta_dpo", keep=1.0, a=2.0, config=config)
    used = trainer.state.log_history[0]["selection/beta_dpo_beta"]

    def loss(logps, _):
        return torch.relu(1 - used * logps.margin).mean()

    live.assert_same_gradient(gradient, live.own_gradient(trainer, batches, loss))


def test_one_pair_is_trained_as_it_is(make_trainer):
    config = {"per_device_train_batch_size": 1}
    trainer, method, gradient, batches = live.one_step(make_trainer, "beta_dpo", config=config)
    assert method.weigh(batches[0]) is None
    live.assert_same_gradient(
        gradient, live.own_gradient(trainer, batches, lambda logps, _: dpo_loss(0.1 * logps.margin).mean())
    )


def test_averages_follow_the_batches_and_survive_a_resume(make_trainer, tmp_path):
    (whole, trace), (resumed, resumed_trace) = live.resumed_state(make_trainer, "beta_dpo", tmp_path)
    assert whole == resumed
    assert whole["updates"] == 6
    resumed_trace.assert_ends_as(trace)
    moments = EmaMoments()
    for values in trace.values:
        moments = ema_update(moments, torch.from_numpy(values["implicit_margin"]) / 0.1)
    assert whole["mean"] == pytest.approx(moments.mean, rel=1e-4)
    assert whole["std"] == pytest.approx(moments.std, rel=1e-4)


def test_dropped_pairs_are_the_unusual_ones(make_trainer):
    """Over many draws the pairs that are left out lie further from the mean than those that are kept."""
    trainer = make_trainer("dpo", per_device_train_batch_size=8, num_train_epochs=3, learning_rate=2e-2)
    tiny.stir(trainer, scale=0.2)
    witness = tiny.attach(trainer, "beta_dpo", keep=0.5)
    trainer.train()
    near, far = [], []
    for step in witness.steps:
        distance = np.abs(step.values["implicit_margin"] - step.values["implicit_margin"].mean())
        kept = step.values["weight"] > 0
        assert kept.sum() == 4
        assert step.values["weight"].sum() == pytest.approx(8)
        near.append(distance[kept].mean())
        far.append(distance[~kept].mean())
    assert np.mean(far) > 1.2 * np.mean(near)
