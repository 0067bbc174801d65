"""The seams in the trainer: a neutral selection is stock TRL bit for bit, and detaching gives stock TRL back."""

import pickle

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import DPOTrainer, SFTTrainer

from dsel_trl import Method, SelectionCallback, SelectionMixin
from dsel_trl.trainer import mixin as seams
from dsel_trl.trainer.forwards import base_model
from dsel_trl.trainer.kinds import trainer_kind
from dsel_trl.trainer.rows import IndexedRows, content_id
from tests import tiny, weighted

ONES = np.ones(40, dtype=np.float32)


class KeepAllGradients(TrainerCallback):
    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append(weighted.gradients(model))


def trained(trainer, method=None):
    """Trains; gives the logged rows, the gradients of each step and the final weights."""
    keep = KeepAllGradients()
    trainer.add_callback(keep)
    if method is not None:
        trainer.add_callback(SelectionCallback(trainer, method))
    trainer.train()
    return tiny.losses_of(trainer), keep.steps, tiny.weights_of(trainer)


def assert_bit_equal(mine, stock):
    assert mine[0] == stock[0]
    assert len(mine[1]) == len(stock[1]) > 0
    for gradients, expected in zip(mine[1], stock[1], strict=True):
        tiny.assert_same_weights(gradients, expected)
    tiny.assert_same_weights(mine[2], stock[2])


NEUTRAL = {
    "uniform": lambda: "uniform",
    "ones": lambda: weighted.FixedWeights(ONES),
    "ones_mean1": lambda: weighted.FixedWeights(ONES, "mean1"),
    "twos_mean1": lambda: weighted.FixedWeights(2 * ONES, "mean1"),
}


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("dpo", {}),
        ("dpo", {"gradient_accumulation_steps": 2}),
        ("dpo", {"lora": True}),
        ("dpo", {"lora": True, "gradient_accumulation_steps": 2, "gradient_checkpointing": True}),
        ("dpo", {"precompute_ref_log_probs": True, "loss_type": ["ipo", "sft"]}),
        ("sft", {}),
        ("sft", {"gradient_accumulation_steps": 2}),
        ("sft", {"lora": True, "loss_type": "dft"}),
        ("lm", {"lora": True, "gradient_accumulation_steps": 2}),
        ("lm", {"padding_free": True, "max_length": None, "gradient_accumulation_steps": 2}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "plain",
)
def test_neutral_is_stock_bit_for_bit(make_trainer, kind, config):
    # Both epochs end in a short batch, and with accumulation in a short step.
    dataset = tiny.DATASETS[kind]().select(range(9))
    config = {"dataset": dataset, "num_train_epochs": 2, "max_grad_norm": 0.5, **config}
    stock = trained(make_trainer(kind, **config))
    for name, method in NEUTRAL.items():
        if name == "twos_mean1" and config.get("gradient_accumulation_steps", 1) > 1:
            continue  # Twice and half are exact, but the clipping of the accumulated gradient is not.
        assert_bit_equal(trained(make_trainer(kind, **config), method()), stock)


def test_other_weights_are_not_stock(make_trainer):
    """What the test above compares differs as soon as a weight does."""
    stock = trained(make_trainer("dpo", max_steps=2))
    almost = ONES.copy()
    almost[:20] = 1.001
    other = trained(make_trainer("dpo", max_steps=2), weighted.FixedWeights(almost))
    with pytest.raises(AssertionError):
        assert_bit_equal(other, stock)


@pytest.mark.parametrize("kind", ["dpo", "sft"])
def test_evaluation_passes_through(make_trainer, kind):
    """Same metrics as stock, and the ledger does not hear of it."""
    config = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "max_steps": 4,
        "eval_dataset": tiny.DATASETS[kind](8, seed=7),
    }
    stock = trained(make_trainer(kind, **config))
    trainer = make_trainer(kind, **config)
    assert_bit_equal(trained(trainer, "uniform"), stock)
    assert any("eval_loss" in row for row in trainer.state.log_history)
    assert trainer.selection.ledger.visits.sum() == 8


def test_packing_with_a_method_that_allows_it(make_trainer):
    config = {"packing": True, "max_length": 32, "packing_strategy": "wrapped", "max_steps": 3}
    stock = trained(make_trainer("lm", **config))
    assert_bit_equal(trained(make_trainer("lm", **config), "uniform"), stock)


# ---- Detaching ----


def anatomy(trainer):
    model = base_model(trainer)
    return {
        "class": type(trainer),
        "attributes": sorted(trainer.__dict__),
        "forward": model.__dict__.get("forward"),
        "hooks": {
            name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in trainer.model.named_modules()
        },
        "ref_hooks": len(trainer.ref_model._forward_hooks) if getattr(trainer, "ref_model", None) else 0,
        "callbacks": list(trainer.callback_handler.callbacks),
        "collator": trainer.data_collator,
        "batch_size": trainer._train_batch_size,
    }


class AsksForMore(Method):
    """Makes the fused head return a field it does not return by itself."""

    name = "asks_for_more"
    outputs = ("log_sum_sq_probs",)

    def score(self, batch):
        assert batch.policy.log_sum_sq_probs is not None
        return batch.loss


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", ["dpo", "sft"])
def test_detach_gives_the_trainer_back(make_trainer, kind, lora):
    trainer = make_trainer(kind, lora=lora, max_steps=3)
    before = anatomy(trainer)
    callback = SelectionCallback(trainer, [weighted.FixedWeights(ONES), AsksForMore()])
    trainer.add_callback(callback)
    attached = anatomy(trainer)
    assert attached["class"] is not before["class"]
    assert attached["hooks"] != before["hooks"]
    callback.detach()
    assert anatomy(trainer) == before
    callback.detach()
    assert anatomy(trainer) == before
    stock = trained(make_trainer(kind, lora=lora, max_steps=3))
    assert_bit_equal(trained(trainer), stock)


def test_detach_after_training_and_attach_again(make_trainer):
    trainer = make_trainer("dpo", max_steps=2)
    callback = SelectionCallback(trainer, "random", keep=0.5)
    trainer.train()
    assert callback.ledger.visits.sum() == 4
    callback.detach()
    assert type(trainer) is DPOTrainer
    trainer.train()
    assert callback.ledger.visits.sum() == 4
    again = SelectionCallback(trainer, "uniform")
    trainer.train()
    assert again.ledger.visits.sum() == 4


def test_two_selections_on_one_trainer_are_refused(make_trainer):
    trainer = make_trainer("dpo")
    SelectionCallback(trainer, "uniform")
    with pytest.raises(ValueError, match="already has a selection"):
        SelectionCallback(trainer, "random")


def test_other_trainers_keep_their_class(make_trainer):
    first, second = make_trainer("dpo"), make_trainer("dpo")
    SelectionCallback(first, "uniform")
    assert type(second) is DPOTrainer
    assert seams.selective_class(DPOTrainer) is type(first)
    assert isinstance(first, DPOTrainer)


# ---- The class ----


@pytest.mark.parametrize("cls", [DPOTrainer, SFTTrainer])
def test_the_made_class_can_be_pickled_by_instance(cls):
    made = seams.selective_class(cls)
    instance = made.__new__(made)
    instance.marker = 3
    copy = pickle.loads(pickle.dumps(instance))
    assert type(copy) is made
    assert copy.__dict__ == {"marker": 3}


def test_the_mixin_serves_a_subclass(model, tmp_path):
    class MyTrainer(SelectionMixin, DPOTrainer):
        """A trainer with the seams in its own class."""

    stock = tiny.make_trainer("dpo", model, tmp_path / "stock", max_steps=3)
    stock.train()
    mine = MyTrainer(str(model), args=stock.args, train_dataset=tiny.preferences())
    assert mine.selection is None
    mine.train()
    tiny.assert_same_weights(tiny.weights_of(mine), tiny.weights_of(stock))

    mine = MyTrainer(str(model), args=stock.args, train_dataset=tiny.preferences())
    callback = SelectionCallback(mine, "random", keep=0.2)
    assert type(mine) is MyTrainer
    mine.train()
    assert callback.ledger.dropped.sum() == 32
    assert (callback.ledger.visits > 0).sum() <= 8
    callback.detach()
    assert type(mine) is MyTrainer
    assert mine.selection is None


def test_trainers_of_other_kinds_are_named():
    with pytest.raises(TypeError, match="object is not supported: use one of DPOTrainer, SFTTrainer, KTOTrainer, Rew"):
        trainer_kind(object())


# ---- The rows ----


def test_rows_carry_their_position(make_trainer):
    rows = IndexedRows(Dataset.from_dict({"a": [5, 6, 7], "example_id": [9, 9, 9]}))
    assert len(rows) == 3
    # The rows themselves, a column of the user's of that name too, stay as they are.
    assert rows[1] == (1, {"a": 6, "example_id": 9})
    assert rows.__getitems__([2, 0]) == [(2, {"a": 7, "example_id": 9}), (0, {"a": 5, "example_id": 9})]


def test_the_content_of_a_row_is_its_id():
    row = {"input_ids": [1, 2, 3], "labels": [1, 2, 3]}
    assert content_id(row) == content_id(dict(reversed(row.items())))
    assert content_id(row) != content_id({**row, "labels": [1, 2, 4]})
    assert 0 <= content_id(row) < 2**63


# ---- Adjusting the trainer for one loss ----


class OwnBeta(Method):
    """Trains each batch with a beta of its own."""

    name = "own_beta"
    trainers = ("dpo",)

    def __init__(self, beta):
        self.beta = beta
        self.margins = []

    def adjust(self, run, batch):
        self.margins.append(batch.log_ratio_margin.clone())
        return {"beta": self.beta}


@pytest.mark.parametrize(
    "config", [{}, {"lora": True}, {"precompute_ref_log_probs": True}], ids=["full", "lora", "pre"]
)
def test_adjusting_beta_is_training_with_that_beta(make_trainer, config):
    trainer = make_trainer("dpo", max_steps=3, beta=0.1, **config)
    method = OwnBeta(0.4)
    adjusted = trained(trainer, method)
    assert trainer.beta == 0.1
    assert len(method.margins) == 3
    stock = trained(make_trainer("dpo", max_steps=3, beta=0.4, **config))
    assert_bit_equal(adjusted, stock)


class AddsHalfTheLoss(Method):
    """Adds half of the mean of squared weights of the output layer."""

    name = "adds"
    packed_rows = True

    def extra_loss(self, run, batch):
        return 0.5 * run.model.get_output_embeddings().weight.square().mean()


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("kind", ["dpo", "sft"])
def test_an_extra_loss_counts_once_per_optimizer_step(make_trainer, kind, steps):
    config = {"max_steps": 1, "max_grad_norm": 0.0, "gradient_accumulation_steps": steps}
    plain = trained(make_trainer(kind, **config))
    trainer = make_trainer(kind, **config)
    weight = trainer.model.get_output_embeddings().weight.detach().clone()
    extra = trained(trainer, AddsHalfTheLoss())
    difference = extra[1][0]["lm_head.weight"] - plain[1][0]["lm_head.weight"]
    torch.testing.assert_close(difference, weight / weight.numel(), rtol=1e-3, atol=1e-8)
    added = extra[0][0]["loss"] - plain[0][0]["loss"]
    assert added == pytest.approx(float(0.5 * weight.square().mean()), rel=1e-3)
