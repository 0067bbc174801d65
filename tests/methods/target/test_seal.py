"""SEAL in a run: the trusted loss is in the step's own gradient, and what goes against the trusted set is left out."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from dsel_trl import SelectionCallback, create_method
from dsel_trl.functional.target.seal import sparse_update
from tests import tiny, weighted

STEP = {"max_steps": 1, "max_grad_norm": 0.0, "learning_rate": 0.0}
DATA = {"dpo": tiny.preferences(8), "sft": tiny.completions(8)}
HELPER = {"helper_learning_rate": 1e-2, "helper_epochs": 4.0}
# Of one example twice the mean over tokens is the mean over examples.
TRUSTED = {"dpo": tiny.preferences(3, seed=5), "sft": tiny.completions(1, seed=5).select([0, 0])}


def gradient(make_trainer, kind, dataset, method=None, **config):
    trainer = make_trainer(kind, dataset=dataset, **{**STEP, "per_device_train_batch_size": len(dataset), **config})
    tiny.stir(trainer, scale=0.05)
    keep = weighted.KeepGradients()
    trainer.add_callback(keep)
    if method is not None:
        trainer.add_callback(SelectionCallback(trainer, method))
    trainer.train()
    return trainer, keep.gradients


def seal(kind, **parameters):
    return create_method("seal", target=TRUSTED[kind], target_batch=len(TRUSTED[kind]), **parameters)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("kind", ["dpo", "sft"])
def test_the_gradient_is_that_of_both_losses(make_trainer, kind, accumulation):
    config = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
    _, data = gradient(make_trainer, kind, DATA[kind], **config)
    _, trusted = gradient(make_trainer, kind, TRUSTED[kind])
    trainer, both = gradient(make_trainer, kind, DATA[kind], seal(kind, upper=0.3), **config)
    for name, value in both.items():
        torch.testing.assert_close(value, 0.7 * data[name] + 0.3 * trusted[name], rtol=1e-4, atol=1e-6)
    # What was measured of the batch is the batch's own.
    assert trainer.selection.ledger.visits.tolist() == [1] * 8
    counts = trainer.selection.costs.counts
    assert counts["forwards"] == counts["backwards"] == accumulation * len(TRUSTED[kind])


def test_the_whole_of_the_trusted_loss(make_trainer):
    _, trusted = gradient(make_trainer, "dpo", TRUSTED["dpo"])
    _, alone = gradient(make_trainer, "dpo", DATA["dpo"], seal("dpo", upper=1.0))
    for name, value in alone.items():
        torch.testing.assert_close(value, trusted[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["dpo", "sft"])
def test_the_logits_learn_from_what_a_model_of_the_data_does_not_have_to_pay(make_trainer, kind):
    trainer = make_trainer(kind, dataset=DATA[kind], **{**STEP, "per_device_train_batch_size": 8})
    tiny.stir(trainer, scale=0.05)
    method = seal(kind, value="helper", helper_lora=False, **HELPER, selector_learning_rate=1.0)
    callback = SelectionCallback(trainer, method)
    trainer.add_callback(callback)
    trainer.train()
    loss, value, ids = callback.ledger["loss"], callback.ledger["seal_value"], np.arange(8)
    # The helper has learned something of the data: the policy, whose rate is 0, has not.
    assert value.mean() < loss.mean()
    expected = sparse_update(np.zeros(8), ids, loss - value, 1.0)
    np.testing.assert_allclose(callback.ledger["seal"], expected, atol=1e-5)
    assert not np.allclose(expected, sparse_update(np.zeros(8), ids, loss, 1.0), atol=1e-3)


def opposed(size=48):
    """Texts that the trusted ones are like, and, in every third row, texts of other words."""
    rng = np.random.default_rng(0)
    words = [tiny.WORDS[200:220] if i % 3 == 2 else tiny.WORDS[:20] for i in range(size)]
    return Dataset.from_list([{"prompt": "w1", "completion": " " + " ".join(rng.choice(own, 8))} for own in words])


@pytest.mark.parametrize("update", ["sparse", "sgd"])
def test_what_goes_against_the_trusted_set_is_left_out(make_trainer, update):
    trusted = opposed().filter(lambda row, i: i % 3 == 0, with_indices=True)
    trainer = make_trainer("sft", dataset=opposed(), num_train_epochs=3, per_device_train_batch_size=4)
    method = create_method("seal", target=trusted, burn_in=2, keep=2 / 3, update=update)
    callback = SelectionCallback(trainer, method)
    trainer.add_callback(callback)
    trainer.train()
    assert (np.flatnonzero(callback.ledger.dropped) % 3 == 2).mean() > 0.8
    assert callback.ledger.dropped.sum() == 16
    logits = callback.ledger["seal"]
    assert logits[2::3].mean() < min(logits[0::3].mean(), logits[1::3].mean())


class Snapshots(TrainerCallback):
    """The weights, and the size of the optimizer's state, when each step begins."""

    def __init__(self):
        self.weights, self.states = [], []

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.weights.append({name: value.detach().clone() for name, value in model.named_parameters()})
        self.states.append(len(optimizer.state))


def anew(make_trainer, resume=None, **config):
    trainer = make_trainer("dpo", dataset=DATA["dpo"], num_train_epochs=4, per_device_train_batch_size=2, **config)
    snapshots = Snapshots()
    trainer.add_callback(snapshots)
    trainer.add_callback(SelectionCallback(trainer, seal("dpo", burn_in=2, keep=0.5, anew=True)))
    trainer.train(resume_from_checkpoint=resume)
    return trainer, snapshots


@pytest.mark.parametrize("lora", [False, True])
def test_the_second_stage_starts_anew(make_trainer, lora):
    _, seen = anew(make_trainer, lora=lora)
    assert len(seen.weights) == 12
    for name, value in seen.weights[0].items():
        assert torch.equal(seen.weights[8][name], value), name
    assert any(not torch.equal(seen.weights[7][name], value) for name, value in seen.weights[0].items())
    assert [place for place, size in enumerate(seen.states) if not size] == [0, 8]


def test_a_resumed_run_starts_anew_as_well(make_trainer, tmp_path):
    config = {"save_strategy": "steps", "save_steps": 5}
    whole, _ = anew(make_trainer, output_dir=tmp_path / "run", **config)
    again, seen = anew(make_trainer, tmp_path / "run" / "checkpoint-5", output_dir=tmp_path / "run", **config)
    assert len(seen.weights) == 7
    for (name, value), other in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(value, other), name


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"upper": 1.1}, "upper=1.1"),
        ({"decay": -0.1}, "decay=-0.1"),
        ({"burn_in": 0}, "burn_in=0"),
        ({"update": "adamw"}, "update='adamw'.*Did you mean 'adam'"),
        ({"activation": "relu"}, "activation='relu'"),
        ({"selector_learning_rate": -1}, "selector_learning_rate=-1"),
    ],
)
def test_wrong_parameters(parameters, message):
    with pytest.raises(ValueError, match=message):
        create_method("seal", target=TRUSTED["sft"], **parameters)
