"""ZIP: what is chosen, complements, the online form, and several processes of compression."""

import zlib

import numpy as np
import pytest
from datasets import Dataset

from dsel_trl import SelectionCallback, create_method
from dsel_trl.functional.text.zip import canonical_example, zip_select
from tests import tiny
from tests.methods import live

SMALL = {"k1": 20, "k2": 6, "k3": 3, "workers": 1}


def canonical(dataset):
    return [
        canonical_example(
            i,
            [("user", row["prompt"]), ("assistant", row["chosen"]), ("assistant", row["rejected"])],
        )
        for i, row in enumerate(dataset)
    ]


@pytest.mark.parametrize("workers", [1, 2])
def test_the_published_selection_is_trained_and_nothing_else(make_trainer, workers):
    trainer = make_trainer("dpo")
    witness = tiny.attach(trainer, "zip", keep=0.3, **{**SMALL, "workers": workers})
    trainer.train()
    expected = zip_select(canonical(tiny.preferences()), 12, k1=20, k2=6, k3=3)
    assert set(np.concatenate(witness.ids).tolist()) == set(expected.tolist())
    assert set(np.flatnonzero(~trainer.selection.ledger.dropped)) == set(expected.tolist())


def test_the_order_of_the_choice_is_a_curriculum(make_trainer):
    trainer = make_trainer("dpo")
    witness = tiny.attach(trainer, "zip", keep=0.3, action="curriculum", pacing="none", **SMALL)
    trainer.train()
    expected = zip_select(canonical(tiny.preferences()), 12, k1=20, k2=6, k3=3)
    assert np.concatenate(witness.ids).tolist() == expected.tolist()


def test_near_duplicates_lose(make_trainer):
    rows = tiny.completions(30).to_list() + [{**tiny.completions(30)[0]} for _ in range(10)]
    trainer = make_trainer("sft", dataset=Dataset.from_list(rows))
    callback = SelectionCallback(trainer, "zip", keep=0.5, unchosen="restore", serializer="text", **SMALL)
    trainer.train()
    kept = np.flatnonzero(~callback.ledger.dropped)
    copies = sum(i == 0 or i >= 30 for i in kept.tolist())
    assert copies <= 2
    texts = [f"{row['prompt']}\n{row['completion']}" for row in rows]
    random = [np.random.default_rng(seed).choice(40, 20, replace=False) for seed in range(20)]

    def ratio(ids):
        joined = "\n".join(texts[i] for i in ids).encode()
        return len(joined) / len(zlib.compress(joined, 9))

    assert ratio(kept) < np.median([ratio(ids) for ids in random])


def test_each_epoch_complements_those_before(make_trainer):
    trainer = make_trainer("sft", num_train_epochs=3)
    witness = tiny.attach(trainer, "zip", keep=0.25, refresh="epoch", unchosen="restore", **SMALL)
    trainer.train()
    epochs = np.array_split(np.concatenate(witness.ids), 3)
    assert [len(set(ids.tolist())) for ids in epochs] == [10, 10, 10]
    assert len(set(np.concatenate(epochs).tolist())) == 30


def test_online_takes_what_was_not_trained_just_now(make_trainer, monkeypatch):
    scored = []
    monkeypatch.setattr("dsel_trl.trainer.step.score_rows", lambda *args, **kwargs: scored.append(args))
    rows = [tiny.completions(40)[i % 4] if i % 2 else tiny.completions(40)[i] for i in range(40)]
    trainer = make_trainer("sft", dataset=Dataset.from_list(rows), max_steps=8)
    witness = tiny.attach(trainer, "zip", form="online", factor=4, serializer="text")
    trainer.train()
    trained = np.concatenate(witness.ids).tolist()
    assert not scored
    copies = [i % 4 for i in trained if i % 2]
    assert len(copies) < len(trained) / 2
    window = trainer.selection.methods.methods[0].state_dict()["window"]
    assert window.tolist() == trained


def test_online_resumes_bit_for_bit(make_trainer, tmp_path):
    config = {"max_steps": 5, "per_device_train_batch_size": 2}
    (whole, trace), (resumed, resumed_trace) = live.resumed_state(
        make_trainer, "zip", tmp_path, config, form="online", factor=4
    )
    np.testing.assert_array_equal(whole["window"], resumed["window"])
    resumed_trace.assert_ends_as(trace)


def test_the_choice_is_made_once(make_trainer, tmp_path, monkeypatch):
    made = []
    for _ in range(2):
        trainer = make_trainer("dpo", output_dir=tmp_path / "run", max_steps=1)
        tiny.attach(trainer, "zip", keep=0.3, **SMALL)
        trainer.train()
        made.append(trainer.selection.ledger["zip"].copy())
        monkeypatch.setattr("dsel_trl.methods.text.zip.zip_select", None)
    np.testing.assert_array_equal(made[0], made[1])


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"form": "onlin"}, "online"),
        ({"k1": 0}, "k1=0"),
        ({"k2": 1.5}, "k2=1.5"),
        ({"serializer": "json"}, "serializer='json'"),
        ({"unchosen": "keep"}, "unchosen='keep'"),
        ({"keep": 1.5}, "keep=1.5"),
    ],
)
def test_wrong_parameters(parameters, message):
    with pytest.raises(ValueError, match=message):
        create_method("zip", **parameters)


def test_a_budget_that_burning_cannot_reach(make_trainer):
    trainer = make_trainer("dpo")
    SelectionCallback(trainer, "zip", keep=0.8)
    with pytest.raises(ValueError, match=r"keep=0.8.*unchosen='restore'"):
        trainer.train()
