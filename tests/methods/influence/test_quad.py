"""Quad in a run: the cluster that helps the target is found and drawn, and nothing else is scored."""

import numpy as np
import pytest
from datasets import Dataset

from dsel_trl import SelectionCallback, create_method
from tests import tiny

KINDS = 3


def mixture(size, seed, kinds=range(KINDS)):
    """Rows of several kinds with words of their own, and a vector that tells them apart."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(size):
        kind = list(kinds)[i % len(kinds)]
        words = [f"w{100 * kind + k}" for k in rng.integers(0, 12, size=12)]
        rows.append(
            {
                "prompt": " ".join(words[:4]),
                "completion": " " + " ".join(words[4:]),
                "vector": [float(kind == k) + 0.01 * rng.normal() for k in range(KINDS)],
                "kind": kind,
            }
        )
    return Dataset.from_list(rows)


def trained(model, folder, lora=False, steps=24, **parameters):
    dataset = mixture(120, 0)
    config = {"max_steps": steps, "per_device_train_batch_size": 4, "learning_rate": 2e-3}
    trainer = tiny.make_trainer("sft", model, folder, dataset=dataset, lora=lora, **config)
    given = {"clusters": KINDS, "arms": 1, "draws": 4, "refresh": 1, "calibration": 12, "target_refresh": 8}
    given |= {"embedding": "column:vector", "target": mixture(8, 1, kinds=[1])}
    method = create_method("quad", **{**given, **parameters})
    witness = tiny.Witness()
    trainer.add_callback(SelectionCallback(trainer, [method, witness]))
    trainer.train()
    return trainer, witness, np.array(dataset["kind"])


@pytest.mark.parametrize(
    "parameters", [{}, {"lora": True}, {"solver": "factored"}, {"precondition": "none", "calibration": 256}]
)
def test_the_cluster_that_helps_the_target_is_drawn_most(model, tmp_path, parameters):
    trainer, witness, kinds = trained(model, tmp_path, **parameters)
    drawn = kinds[np.concatenate([step.ids for step in witness.steps])]
    # Each cluster is looked at, and the target's own comes most often.
    assert set(drawn) == set(range(KINDS))
    counts = np.bincount(drawn[len(drawn) // 3 :], minlength=KINDS)
    assert counts[1] > 0.5 * counts.sum()
    scores = trainer.selection.ledger["quad"]
    seen = np.unique(np.concatenate([step.ids for step in witness.steps]))
    assert np.isfinite(scores[seen]).all()
    assert np.isnan(np.delete(scores, seen)).all()
    assert np.nanmean(scores[kinds == 1]) > np.nanmean(scores[kinds != 1])


def test_an_example_without_a_vector_comes_last(model, tmp_path):
    rows = mixture(12, 0).to_list()
    for row in rows[:3]:
        row["vector"] = [float("nan")] * KINDS
    trainer = tiny.make_trainer("sft", model, tmp_path, dataset=Dataset.from_list(rows), max_steps=6)
    target = mixture(4, 1)
    parameters = {"embedding": "column:vector", "clusters": 2, "calibration": 4, "keep": 1.0}
    witness = tiny.attach(trainer, "quad", target=target, **parameters)
    trainer.train()
    order = np.concatenate([step.ids for step in witness.steps])
    assert sorted(order[-3:]) == [0, 1, 2]


@pytest.mark.parametrize(
    ("parameters", "error"),
    [
        ({"damping": 0.0}, r"damping=0.0"),
        ({"keep": 0.0}, r"keep=0.0"),
        ({"refresh": "never"}, r"refresh='never'"),
        ({"precondition": "hessian"}, r"precondition='hessian'"),
        ({"precondition": "adam", "calibration": 3}, r"calibration"),
    ],
)
def test_wrong_parameters(parameters, error):
    with pytest.raises(ValueError, match=error):
        create_method("quad", target="demo", **parameters)


def test_layers_without_factors_are_an_error_before_the_first_step(model, tmp_path):
    trainer = tiny.make_trainer("sft", model, tmp_path, max_steps=1)
    trainer.add_callback(SelectionCallback(trainer, create_method("quad", target=tiny.completions(4), layers="norm")))
    with pytest.raises(ValueError, match="has no factors of the Hessian"):
        trainer.train()
