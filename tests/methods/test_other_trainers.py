"""Methods on a trainer of reward models: exact weights, margins of the head, and what is refused."""

import numpy as np
import pytest
import torch

from dsel_trl import SelectionCallback, create_method
from dsel_trl.methods.control.weight_column import WeightColumn
from tests import tiny, weighted
from tests.methods import live


def pair_loss(trainer, inputs, coefficient=0.0):
    rewards = trainer.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits.squeeze(-1)
    chosen, rejected = rewards.chunk(2)
    return torch.nn.functional.softplus(rejected - chosen) + coefficient * (chosen + rejected) ** 2


@pytest.mark.parametrize("coefficient", [None, 0.1])
def test_weights_are_exact(reward_trainer, coefficient):
    trainer = reward_trainer(
        max_steps=1,
        learning_rate=0.0,
        max_grad_norm=0.0,
        per_device_train_batch_size=6,
        center_rewards_coefficient=coefficient,
    )
    gradient, batches = live.first_step(trainer, WeightColumn(normalize="none"))
    (batch,) = batches
    np.testing.assert_allclose(batch.loss, pair_loss(trainer, batch.inputs, coefficient or 0.0).detach(), rtol=1e-4)
    trainer.selection.detach()
    trainer.model.zero_grad()
    weights = torch.tensor(tiny.preferences()["weight"])[batch.ids]
    (weights * pair_loss(trainer, batch.inputs, coefficient or 0.0)).mean().backward()
    live.assert_same_gradient(gradient, weighted.gradients(trainer.model))


def test_neutral_is_stock(reward_trainer):
    stock, other = reward_trainer(), reward_trainer()
    SelectionCallback(other, "uniform")
    stock.train()
    other.train()
    tiny.assert_same_weights(tiny.weights_of(other), tiny.weights_of(stock))


def test_margins_of_the_head_choose(reward_trainer):
    trainer = reward_trainer(num_train_epochs=2)
    callback = SelectionCallback(trainer, "margin", source="implicit", action="keep_bottom", keep=0.5)
    trainer.train()
    assert np.isfinite(callback.ledger["margin"]).any()
    assert callback.ledger.dropped.sum() == 20
    values = callback.run.passes.measure(lambda batch: batch.implicit_margin)
    assert np.isfinite(values).all()


@pytest.mark.parametrize("name", ["beta_dpo", "wpo", "amapo"])
def test_methods_of_log_probabilities_are_refused(reward_trainer, name):
    with pytest.raises(ValueError, match="not with RewardTrainer"):
        SelectionCallback(reward_trainer(), name)
    trainer = reward_trainer()
    SelectionCallback(trainer, create_method("robust_dpo", mode="rdpo"))
    with pytest.raises(ValueError, match="posterior"):
        trainer.train()
