"""Rho-1 and JEST: token weights and candidate draws against a reference."""

from functools import partial

import numpy as np
import pytest
import torch

from dsel_trl import SelectionCallback, create_method
from dsel_trl.core.ledger import Ledger
from dsel_trl.core.randomness import stream
from dsel_trl.functional.loss.rho1 import select_tokens
from dsel_trl.signals.tap import label_log_probs
from tests import tiny, weighted
from tests.methods import live


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return str(tiny.build_model(tmp_path_factory.mktemp("reference"), seed=7))


def nll(model, inputs):
    outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    return -label_log_probs(outputs.logits, inputs["labels"])


@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_rho1_trains_the_mean_over_the_selected_tokens(make_trainer, reference, scope):
    config = {"max_steps": 1, "learning_rate": 0.0, "max_grad_norm": 0.0, "per_device_train_batch_size": 6}
    trainer = make_trainer("sft", **config)
    method = create_method("rho1", model=reference, keep=0.4, scope=scope)
    gradient, batches = live.first_step(trainer, method)
    from transformers import AutoModelForCausalLM

    other = AutoModelForCausalLM.from_pretrained(reference).eval()
    trainer.selection.detach()
    trainer.model.zero_grad()
    inputs = batches[0].inputs
    mask = inputs["labels"][:, 1:] != -100
    losses = nll(trainer.model, inputs)
    with torch.no_grad():
        excess = losses.detach() - nll(other, inputs)
    selected = select_tokens(excess, mask, 0.4, scope)
    assert 0 < selected.sum() < mask.sum()
    losses[selected].mean().backward()
    live.assert_same_gradient(gradient, weighted.gradients(trainer.model))


def test_rho1_measures_its_reference_once(make_trainer, reference, tmp_path, monkeypatch):
    for _ in range(2):
        trainer = make_trainer("sft", output_dir=tmp_path / "run", max_steps=1)
        tiny.attach(trainer, "rho1", model=reference)
        trainer.train()
        assert len(list((tmp_path / "run" / "selection").glob("rho1-*"))) == 1
        monkeypatch.setattr("dsel_trl.methods.loss.rho1.Rho1.second_tokens", None)


def test_rho1_in_padding_free_rows(make_trainer, reference):
    weights = []
    for padding_free in (False, True):
        config = {"max_steps": 1, "per_device_train_batch_size": 4, "padding_free": padding_free, "max_length": None}
        trainer = make_trainer("sft", **config)
        witness = tiny.attach(trainer, "rho1", model=reference, keep=0.5)
        trainer.train()
        weights.append((witness.ids, witness.steps[0].values["weight"], witness.steps[0].values["rho1"]))
    assert weights[0][0] == weights[1][0]
    np.testing.assert_allclose(weights[0][1], weights[1][1], rtol=1e-4)
    np.testing.assert_allclose(weights[0][2], weights[1][2], rtol=1e-3, atol=1e-4)


def test_rho1_is_for_sft(make_trainer, reference):
    with pytest.raises(ValueError, match="rho1"):
        SelectionCallback(make_trainer("dpo"), "rho1", model=reference)


# ---- JEST ----


@pytest.mark.parametrize("kind", ["dpo", "sft"])
def test_jest_takes_the_most_learnable(make_trainer, reference, kind):
    trainer = make_trainer(kind, max_steps=1, learning_rate=0.0)
    seen = []
    method = create_method("jest", model=reference, factor=4, temperature=0.0)
    pick = method.pick

    def watched(run, candidates):
        positions = pick(run, candidates)
        seen.append((candidates.ids.numpy(), candidates.loss.numpy(), positions.numpy()))
        return positions

    method.pick = watched
    tiny.attach(trainer, method)
    trainer.train()
    ids, losses, positions = seen[0]
    other = trainer.selection.ledger["jest_second_loss"]
    assert np.isfinite(other).all()
    assert np.ptp(other) > 1e-3
    learnable = losses - other[ids]
    assert len(ids) == 8
    assert sorted(positions.tolist()) == sorted(np.argsort(-learnable)[:2].tolist())


def test_jest_second_loss_of_pairs_is_its_loss_in_the_policys_place(make_trainer, reference, model, tmp_path):
    trainer = make_trainer("dpo", max_steps=1)
    callback = SelectionCallback(trainer, "jest", model=reference, factor=2)
    trainer.train()
    # A trainer whose policy is the reference model and whose reference is the first policy.
    from transformers import AutoModelForCausalLM
    from trl import DPOTrainer

    args = trainer.args
    judged = DPOTrainer(
        reference,
        ref_model=AutoModelForCausalLM.from_pretrained(model),
        args=type(args)(str(tmp_path / "judged"), **{**tiny.COMMON, "max_steps": 1, "learning_rate": 0.0}),
        train_dataset=tiny.preferences(),
    )
    witness = tiny.attach(judged, "uniform")
    judged.train()
    (step,) = witness.steps
    np.testing.assert_allclose(callback.ledger["jest_second_loss"][step.ids], step.values["loss"], rtol=1e-3)


def test_jest_draws_more_often_what_is_more_learnable():
    from types import SimpleNamespace

    method = create_method("jest", loss_column="x", factor=4)
    method._second_losses = np.zeros(8, dtype=np.float32)
    losses = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, float("nan")])
    batch = SimpleNamespace(loss=losses, ids=torch.arange(8), gather=lambda values: (values, slice(0, 8)))
    counts = np.zeros(8)
    for step in range(400):
        run = SimpleNamespace(step=step, rng=partial(stream, 0), ledger=Ledger(8))
        counts[method.pick(run, batch).numpy()] += 1
    assert counts.sum() == 800
    assert counts[7] == 0
    assert np.corrcoef(counts[:7], np.arange(7))[0, 1] > 0.9


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("rho1", {}, "exactly one of"),
        ("rho1", {"model": "a", "clean_column": "b"}, "exactly one of"),
        ("rho1", {"model": "a", "keep": 0}, "keep=0"),
        ("rho1", {"model": "a", "scope": "token"}, "scope='token'"),
        ("jest", {}, "exactly one of"),
        ("jest", {"model": "a", "factor": 1}, "factor=1"),
        ("jest", {"model": "a", "temperature": -1}, "temperature=-1"),
    ],
)
def test_wrong_parameters(name, parameters, message):
    with pytest.raises(ValueError, match=message):
        create_method(name, **parameters)


def test_a_reference_that_cannot_be_loaded(make_trainer):
    trainer = make_trainer("sft")
    SelectionCallback(trainer, "rho1", model="nowhere/at/all")
    with pytest.raises(ValueError, match="model='nowhere/at/all'"):
        trainer.train()
