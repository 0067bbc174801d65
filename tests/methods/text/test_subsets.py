"""SemDeDup, D4 and DSIR: what they keep is what their formulas say of the embeddings and texts at hand."""

import importlib.util
import sys
from functools import partial

import numpy as np
import pytest
from datasets import Dataset

from dsel_trl import SelectionCallback, create_method
from dsel_trl.core.randomness import stream_seed
from dsel_trl.functional.kmeans import spherical_kmeans
from dsel_trl.functional.text.d4 import d4_select
from dsel_trl.functional.text.dsir import hash_ngrams
from tests import tiny
from tests.methods import live

NEEDS_FAISS = pytest.mark.skipif(importlib.util.find_spec("faiss") is None, reason="faiss is not installed")


def vectors_with_twins(copies=10):
    """40 vectors of which the last `copies` say nearly the same as the first ones."""
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(40, 16))
    vectors[-copies:] = vectors[:copies] + 1e-3 * rng.normal(size=(copies, 16))
    return vectors


@pytest.fixture
def twins():
    return tiny.completions().add_column("vector", vectors_with_twins().tolist())


def kept(make_trainer, name, dataset=None, config=None, **parameters):
    trainer = make_trainer("sft", dataset=dataset, max_steps=1, **(config or {}))
    callback = SelectionCallback(trainer, name, **parameters)
    trainer.train()
    return np.flatnonzero(~callback.ledger.dropped), callback


def test_semdedup_drops_one_of_each_pair_of_twins(make_trainer, twins):
    ids, callback = kept(make_trainer, "semdedup", twins, embedding="column:vector", eps=0.05, clusters=1)
    assert len(ids) == 30
    for twin in range(10):
        assert (twin in ids) != (30 + twin in ids)
    similarity = callback.ledger["semdedup_similarity"]
    assert (similarity > 0.95).sum() == 10


def test_semdedup_keeps_the_share(make_trainer):
    ids, _ = kept(make_trainer, "semdedup", keep=0.6, clusters=2)
    assert len(ids) == 24


def test_d4_is_its_formula(make_trainer, twins):
    ids, _ = kept(make_trainer, "d4", twins, embedding="column:vector", clusters=3, config={"data_seed": 5})
    expected = d4_select(vectors_with_twins().astype(np.float32), num_clusters=3, seed=stream_seed(5, "d4/clusters"))
    assert ids.tolist() == expected.tolist()


@NEEDS_FAISS
def test_faiss_finds_the_same_twins(make_trainer, twins, tmp_path):
    parameters = {"embedding": "column:vector", "eps": 0.05, "clusters": 1}
    found = [
        kept(make_trainer, "semdedup", twins, {"output_dir": tmp_path / backend}, backend=backend, **parameters)[0]
        for backend in ("sklearn", "faiss")
    ]
    assert found[0].tolist() == found[1].tolist()
    assert len(found[1]) == 30


@NEEDS_FAISS
@pytest.mark.parametrize("seed", [5, 2**32 - 1])
def test_d4_with_faiss_is_its_formula(make_trainer, twins, seed):
    ids, _ = kept(
        make_trainer, "d4", twins, {"data_seed": seed}, embedding="column:vector", clusters=3, backend="faiss"
    )
    expected = d4_select(
        vectors_with_twins().astype(np.float32),
        num_clusters=3,
        seed=stream_seed(seed, "d4/clusters"),
        cluster=partial(spherical_kmeans, backend="faiss"),
    )
    assert ids.tolist() == expected.tolist()
    assert len(ids) == round(0.5 * 30)


@NEEDS_FAISS
def test_semdedup_with_faiss_resumes_bit_for_bit(make_trainer, tmp_path):
    config = {"num_train_epochs": 2, "max_steps": -1, "save_steps": 3}
    (_, trace), (_, resumed) = live.resumed_state(
        make_trainer, "semdedup", tmp_path, config, keep=0.5, clusters=2, refresh="epoch", backend="faiss"
    )
    resumed.assert_ends_as(trace)


def test_the_policys_embeddings_are_clustered_anew_each_epoch(make_trainer):
    trainer = make_trainer("sft", num_train_epochs=2)
    callback = SelectionCallback(trainer, "semdedup", keep=0.5, clusters=2, refresh="epoch")
    trainer.train()
    assert (callback.ledger.steps("semdedup_similarity") == trainer.state.max_steps // 2).all()


def test_semdedup_resumes_bit_for_bit(make_trainer, tmp_path):
    config = {"num_train_epochs": 2, "max_steps": -1, "save_steps": 3}
    (_, trace), (_, resumed) = live.resumed_state(
        make_trainer, "semdedup", tmp_path, config, keep=0.5, clusters=2, refresh="epoch"
    )
    resumed.assert_ends_as(trace)


def test_without_the_library_the_error_says_what_to_install(make_trainer, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    trainer = make_trainer("sft")
    SelectionCallback(trainer, "semdedup")
    with pytest.raises(ImportError, match=r"scikit-learn.*dsel-trl\[cluster\]"):
        trainer.train()


# ---- DSIR ----


def two_domains():
    rng = np.random.default_rng(2)
    rows = []
    for i in range(40):
        words = tiny.WORDS[:40] if i % 2 else tiny.WORDS[200:240]
        rows.append({"text": " ".join(rng.choice(words, 12)), "target": float(i in (1, 3, 5, 7))})
    return Dataset.from_list(rows)


def test_dsir_takes_what_looks_like_the_target(make_trainer):
    trainer = make_trainer("lm", dataset=two_domains(), max_steps=1)
    callback = SelectionCallback(trainer, "dsir", target_column="target", smoothing=0.1, keep=0.4, action="keep_top")
    trainer.train()
    assert (np.flatnonzero(~callback.ledger.dropped) % 2 == 1).all()


def test_dsir_by_a_file_and_its_draws(make_trainer, tmp_path):
    (tmp_path / "target.txt").write_text("\n".join(two_domains()["text"][1::2]))
    picked = []
    for refresh in ("never", "epoch"):
        trainer = make_trainer("lm", dataset=two_domains(), num_train_epochs=2)
        witness = tiny.attach(
            trainer, "dsir", target=str(tmp_path / "target.txt"), keep=0.3, refresh=refresh, temperature=1e6
        )
        trainer.train()
        picked.append([set(part.tolist()) for part in np.array_split(np.concatenate(witness.ids), 2)])
    assert picked[0][0] == picked[0][1]
    assert picked[1][0] != picked[1][1]
    assert len(picked[0][0]) == 12


def test_dsir_of_the_data_itself_is_uniform(make_trainer):
    dataset = two_domains().remove_columns("target").add_column("target", [1.0] * 40)
    trainer = make_trainer("lm", dataset=dataset, max_steps=1)
    callback = SelectionCallback(trainer, "dsir", target_column="target")
    trainer.train()
    words = hash_ngrams(dataset["text"]).num_words
    assert np.abs(callback.ledger["dsir"]).max() <= 1e-6 * words.max() * 2


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("semdedup", {"eps": -1}, "eps=-1"),
        ("semdedup", {"prefer": "soft"}, "prefer='soft'"),
        ("semdedup", {"refresh": "epoch", "embedding": "column:x"}, "refresh='epoch'"),
        ("d4", {"keep": 0.5}, "dedup"),
        ("d4", {"diversify": 0}, "diversify=0"),
        ("dsir", {}, "give exactly one"),
        ("dsir", {"target": "none.txt"}, "no such file"),
        ("dsir", {"target_column": "x", "buckets": 0}, "buckets=0"),
    ],
)
def test_wrong_parameters(name, parameters, message):
    with pytest.raises(ValueError, match=message):
        create_method(name, **parameters)
