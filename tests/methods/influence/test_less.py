"""LESS in a run: its scores against backward passes by hand, what it keeps, and a pass that was cut off."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dsel_trl import create_method
from dsel_trl.functional.influence.less import adam_update
from dsel_trl.functional.projection import rademacher, stream_of
from dsel_trl.scorers.feature_store import FeatureStore
from tests import tiny

PARAMETERS = {"warm_up": 0.5, "checkpoints": 2, "features": 64, "dtype": "float32", "projection": "rademacher"}


def by_hand(trainer, rows, index, names):
    """Gradient of one example's own loss by the named parameters."""
    trainer.model.eval()
    inputs = rows.collate(np.array([index]))
    logits = trainer.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
    labels = inputs["labels"][:, 1:]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    named = dict(trainer.model.named_parameters())
    found = torch.autograd.grad(loss, [named[name] for name in names])
    trainer.model.train()
    return dict(zip(names, found, strict=True))


def test_scores_are_what_backward_passes_give(make_trainer, monkeypatch):
    trainer = make_trainer("sft", dataset=tiny.completions(8), num_train_epochs=2)
    tiny.attach(trainer, "less", target=tiny.completions(3, seed=5), keep=0.5, layers="last-1", **PARAMETERS)
    method, run = trainer.selection.methods.methods[0], trainer.selection.run
    expected, rates = [], []
    measured = type(method)._measured

    def beside(self, run):
        moments = run.gradients.moments("last-1")

        def projected(gradients, adam):
            total = 0
            for name, value in gradients.items():
                value = adam_update(value, *moments[name]) if adam else value
                seed = stream_of(run.stream_seed("less/projection"), name)
                total = total + rademacher(value.flatten()[None], 64, seed)[0]
            return torch.nn.functional.normalize(total, dim=0)

        names = list(moments)
        train = torch.stack([projected(by_hand(trainer, run.rows, i, names), True) for i in range(8)])
        target = self.target_rows(run)
        aimed = torch.stack([projected(by_hand(trainer, target, i, names), False) for i in range(3)])
        expected.append((train @ aimed.T).mean(dim=1))
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        return measured(self, run)

    monkeypatch.setattr(type(method), "_measured", beside)
    trainer.train()
    assert len(expected) == 2
    scores = sum(rate / sum(rates) * values for rate, values in zip(rates, expected, strict=True))
    np.testing.assert_allclose(trainer.selection.ledger["less"], scores.numpy(), rtol=1e-4, atol=1e-6)
    index = json.loads((Path(run.output_dir) / "selection" / "less" / "checkpoint-1-0.json").read_text())
    assert index["shape"] == [8, 64]


def test_after_the_warm_up_the_top_share_is_trained(make_trainer):
    trainer = make_trainer("sft", dataset=tiny.completions(16), num_train_epochs=4)
    witness = tiny.attach(trainer, "less", target=tiny.completions(2, seed=5), keep=0.5, layers="last-1", **PARAMETERS)
    trainer.train()
    scores = trainer.selection.ledger["less"]
    best = set(np.argsort(-scores)[:8].tolist())
    # Of 16 steps of 2 the first 8 are the warm-up; the plan in flight is served with a lag of some batches.
    assert {i for ids in witness.ids[-4:] for i in ids} <= best
    assert not {i for ids in witness.ids[:8] for i in ids} <= best


def test_the_greatest_of_several_subtasks_counts(make_trainer):
    target = tiny.completions(4, seed=5).add_column("task", ["a", "b", "a", "b"])
    trainer = make_trainer("sft", dataset=tiny.completions(8), num_train_epochs=2)
    tiny.attach(trainer, "less", target=target, keep=0.5, layers="last-1", subtask_column="task", **PARAMETERS)
    trainer.train()
    method = trainer.selection.methods.methods[0]
    tables = [method.state_dict()[f"influence/{k}"] for k in range(2)]
    assert all(table.shape == (8, 2) for table in tables)
    mean = np.mean(tables, axis=0)
    np.testing.assert_allclose(trainer.selection.ledger["less"], mean.max(axis=1), rtol=1e-5)


def test_a_pass_that_was_cut_off_measures_only_what_is_missing(make_trainer, tmp_path, monkeypatch):
    def run(folder, write):
        trainer = make_trainer("sft", dataset=tiny.completions(8), num_train_epochs=2, output_dir=folder)
        tiny.attach(trainer, "less", target=tiny.completions(2, seed=5), keep=0.5, layers="last-1", **PARAMETERS)
        written = []

        def counted(self, positions, values):
            written.append(len(positions))
            write(self, positions, values, sum(written))

        monkeypatch.setattr(FeatureStore, "write", counted)
        try:
            trainer.train()
        except KeyboardInterrupt:
            return None, written
        return trainer.selection.ledger["less"].copy(), written

    plain = FeatureStore.write

    def cut(self, positions, values, total):
        plain(self, positions, values)
        if total > 9:
            raise KeyboardInterrupt

    whole, _ = run(tmp_path / "whole", lambda self, positions, values, total: plain(self, positions, values))
    assert run(tmp_path / "cut", cut)[0] is None
    again, written = run(tmp_path / "cut", lambda self, positions, values, total: plain(self, positions, values))
    # The first pass had been written whole, two rows of the second.
    assert sum(written) == 6
    np.testing.assert_array_equal(again, whole)


def test_mistakes_show_before_the_first_step(make_trainer):
    with pytest.raises(ValueError, match="features=60 is no square"):
        create_method("less", target=tiny.completions(2), features=60)
    with pytest.raises(ValueError, match="target=None"):
        create_method("less")
    trainer = make_trainer("sft", optim="sgd")
    tiny.attach(trainer, "less", target=tiny.completions(2))
    with pytest.raises(ValueError, match="second moments of Adam"):
        trainer.train()
    assert trainer.state.global_step == 0
