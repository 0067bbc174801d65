"""IFD's options: Cherry's warm-up and Superfiltering's choice for diversity."""

import sys

import numpy as np
import pytest
import torch

from dsel_trl import SelectionCallback, create_method
from dsel_trl.core.randomness import stream_seed
from dsel_trl.functional.facility_location import facility_location
from dsel_trl.functional.kmeans import kmeans
from dsel_trl.functional.text.ifd import pre_experienced_ids
from dsel_trl.trainer.helper_run import train_helper
from tests import tiny
from tests.methods import live

WARM = {"form": "cherry", "warm_up": 3, "warm_up_clusters": 4, "helper_lora": False, "limit": 5.0, "keep": 0.5}


def run(make_trainer, kind="sft", name="ifd", config=None, **parameters):
    trainer = make_trainer(kind, **{"max_steps": 1, "learning_rate": 0.0, **(config or {})})
    callback = SelectionCallback(trainer, name, **parameters)
    trainer.train()
    return trainer, callback


# ---- Cherry's warm-up ----


@torch.no_grad()
def instruction(trainer, row):
    """Mean last state and perplexity of an instruction alone, through the plain model."""
    answer = sum(label != -100 for label in row["labels"]) if "labels" in row else 0
    tokens = row["prompt_ids"] if "prompt_ids" in row else row["input_ids"][: len(row["input_ids"]) - answer]
    ids = torch.tensor([tokens])
    output = trainer.model.eval()(ids, labels=ids, output_hidden_states=True)
    return output.hidden_states[-1][0].mean(dim=0).numpy(), float(output.loss.exp())


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_the_helper_trains_on_some_of_every_cluster(make_trainer, monkeypatch, kind):
    asked = {}

    def spy(trainer, train_ids, score_ids, measure, **how):
        asked.update(ids=train_ids, **how)
        return train_helper(trainer, train_ids, score_ids, measure, **how)

    monkeypatch.setattr("dsel_trl.trainer.run.train_helper", spy)
    rate = {"helper_learning_rate": 0.01, "helper_epochs": 2.0}
    trainer, _ = run(make_trainer, kind, config={"data_seed": 3}, **WARM, **rate)
    vectors, perplexity = zip(*(instruction(trainer, row) for row in trainer.train_dataset), strict=True)
    labels = kmeans(np.stack(vectors), 4, seed=stream_seed(3, "ifd/clusters"))[0]
    assert asked["ids"].tolist() == pre_experienced_ids(perplexity, labels, per_cluster=3).tolist()
    assert 8 <= len(asked["ids"]) <= 12
    assert (asked["epochs"], asked["learning_rate"], asked["lora"]) == (2.0, 0.01, False)
    assert asked["seed"] == stream_seed(3, "ifd/helper")
    assert "model" not in asked


def test_the_helper_is_asked_and_the_policy_stays(make_trainer):
    before = tiny.weights_of(make_trainer("sft"))
    _, as_it_is = run(make_trainer, form="cherry", limit=5.0, keep=0.5)
    trainer, callback = run(make_trainer, **WARM, helper_learning_rate=0.01)
    tiny.assert_same_weights(before, tiny.weights_of(trainer))
    # Three steps on a third of the data: answers have become likelier, with the instruction and without it.
    for name in ("ifd_conditioned", "ifd_alone"):
        assert callback.ledger[name].mean() < as_it_is.ledger[name].mean() - 0.01
    np.testing.assert_allclose(
        callback.ledger["ifd"], callback.ledger["ifd_conditioned"] / callback.ledger["ifd_alone"], rtol=1e-6
    )
    # A helper that learns nothing answers as the policy does.
    _, idle = run(make_trainer, **WARM, helper_learning_rate=0.0)
    np.testing.assert_allclose(idle.ledger["ifd"], as_it_is.ledger["ifd"], rtol=1e-5)


def test_one_seed_one_warm_up(make_trainer, tmp_path):
    found = []
    for number, seed in enumerate((1, 1, 2)):
        config = {"data_seed": seed, "output_dir": tmp_path / str(number)}
        _, callback = run(make_trainer, config=config, **WARM, helper_learning_rate=0.01)
        found.append(callback.ledger["ifd"].copy())
    np.testing.assert_array_equal(found[0], found[1])
    assert not np.array_equal(found[0], found[2])


def test_the_warm_up_leaves_the_generators_alone(make_trainer, tmp_path):
    """A run that finds its scores on disk goes on as one that had to measure them."""
    traces = []
    for _ in range(2):
        trainer = make_trainer("sft", max_steps=3, lora=True, lora_dropout=0.2, output_dir=tmp_path / "same")
        witness = tiny.attach(trainer, "ifd", **WARM)
        trainer.train()
        traces.append(tiny.Trace.of(trainer, witness))
    assert len(list((tmp_path / "same" / "selection").glob("ifd-*"))) == 1
    assert traces[0].ids == traces[1].ids
    tiny.assert_same_weights(traces[0].weights, traces[1].weights)


def test_a_resumed_run_warms_nothing_up(make_trainer, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        "dsel_trl.trainer.run.train_helper", lambda *args, **how: calls.append(1) or train_helper(*args, **how)
    )
    make = lambda kind, **config: make_trainer("sft", **config)  # noqa: E731
    (_, trace), (_, resumed) = live.resumed_state(make, "ifd", tmp_path, {"max_steps": 5}, **{**WARM, "keep": 0.8})
    resumed.assert_ends_as(trace)
    assert len(calls) == 1


def test_the_warm_up_needs_instructions_and_its_library(make_trainer, monkeypatch):
    short = [{"prompt": "w1", "chosen": f" w{i} w3", "rejected": f" w{i}"} for i in range(20)]
    trainer = make_trainer("dpo", dataset=tiny.Dataset.from_list(short))
    SelectionCallback(trainer, "ifd", **WARM)
    with pytest.raises(ValueError, match="warm_up=3 clusters instructions, but no example has one"):
        trainer.train()
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    trainer = make_trainer("sft")
    SelectionCallback(trainer, "ifd", **WARM)
    with pytest.raises(ImportError, match=r"scikit-learn.*dsel-trl\[cluster\]"):
        trainer.train()


# ---- Superfiltering.D ----

VECTORS = np.random.default_rng(4).normal(size=(40, 6))
SPREAD = {"keep": 0.5, "limit": 5.0, "diverse": 0.2}


def with_vectors():
    return tiny.completions().add_column("vector", VECTORS.tolist())


@pytest.mark.parametrize("form", ["superfiltering", "cherry"])
def test_the_best_are_thinned_for_diversity(make_trainer, form):
    config = {"dataset": with_vectors()}
    _, wide = run(make_trainer, config=config, form=form, **{**SPREAD, "diverse": None})
    _, callback = run(make_trainer, config=config, form=form, **SPREAD, embedding="column:vector")
    scores = wide.ledger["ifd"]
    best = np.flatnonzero(~wide.ledger.dropped)
    known = int(np.isfinite(scores).sum())
    assert len(best) == known // 2
    expected = best[facility_location(VECTORS[best].astype(np.float32), known // 5)]
    kept = np.flatnonzero(~callback.ledger.dropped)
    assert kept.tolist() == sorted(expected)
    np.testing.assert_array_equal(callback.ledger["ifd"][kept], scores[kept])
    assert np.isneginf(np.delete(callback.ledger["ifd"], kept)).all()
    # It did something: the best fifth alone would be others.
    assert set(kept) != set(np.argsort(-scores)[: known // 5])


def test_diversity_of_the_policys_own_states_is_renewed(make_trainer):
    config = {"max_steps": -1, "num_train_epochs": 2, "learning_rate": 5e-3}
    trainer, callback = run(make_trainer, config=config, **SPREAD, refresh="epoch")
    assert (callback.ledger.steps("ifd") == trainer.state.max_steps // 2).all()
    assert np.isfinite(callback.ledger["ifd"]).sum() == 8


def test_with_warm_up_and_in_order(make_trainer):
    trainer = make_trainer("sft", dataset=with_vectors(), num_train_epochs=1)
    parameters = {**WARM, "diverse": 0.25, "embedding": "column:vector", "action": "curriculum", "pacing": "none"}
    witness = tiny.attach(trainer, "ifd", **parameters)
    trainer.train()
    served = [i for ids in witness.ids for i in ids]
    scores = trainer.selection.ledger["ifd"]
    assert served == np.argsort(-scores)[:10].tolist()


@pytest.mark.parametrize("name", ["ifd", "semdedup", "d4", "deita"])
@pytest.mark.parametrize("source", ["column", "file"])
def test_other_vectors_are_not_taken_for_the_old_ones(make_trainer, tmp_path, name, source):
    """The scores on disk belong to the vectors they were chosen by."""
    own = {
        "ifd": SPREAD,
        "semdedup": {"keep": 0.5, "clusters": 2},
        "d4": {"clusters": 2},
        "deita": {"complexity_column": "difficulty", "quality_column": "weight", "threshold": 0.3, "keep": 0.3},
    }[name]
    kept = []
    for seed in (0, 1):
        vectors = np.random.default_rng(seed).normal(size=(40, 3))
        np.save(tmp_path / "vectors.npy", vectors)
        embedding = "column:vector" if source == "column" else f"file:{tmp_path / 'vectors.npy'}"
        dataset = tiny.completions().add_column("vector", vectors.tolist())
        _, callback = run(make_trainer, name=name, config={"dataset": dataset}, embedding=embedding, **own)
        kept.append(np.flatnonzero(~callback.ledger.dropped).tolist())
    assert kept[0] != kept[1]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"warm_up": 10}, "form='superfiltering'"),
        ({"form": "cherry", "warm_up": 10, "model": "gpt2"}, "model='gpt2'"),
        ({"form": "cherry", "warm_up": 10, "refresh": "epoch"}, "refresh='epoch'"),
        ({"form": "cherry", "warm_up": 1.5}, "warm_up=1.5"),
        ({"form": "cherry", "warm_up": True}, "warm_up=True"),
        ({"warm_up_clusters": 0}, "warm_up_clusters=0"),
        ({"warm_up_low": 60, "warm_up_high": 40}, "warm_up_low=60"),
        ({"helper_epochs": 0}, "helper_epochs=0"),
        ({"diverse": 0.2}, r"diverse=0.2 is more than what keep=0.1"),
        ({"diverse": 0}, "diverse=0"),
        ({"diverse": 0.05, "action": "weight"}, "action='weight'"),
        ({"diverse": 0.05, "embedding": "colum:x"}, "embedding='colum:x'"),
    ],
)
def test_wrong_parameters(parameters, message):
    with pytest.raises(ValueError, match=message):
        create_method("ifd", **parameters)
