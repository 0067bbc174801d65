"""What a selection is told beside its methods: by which column to log, and what to do about identical pairs."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from dsel_trl import SelectionCallback
from tests import tiny


def summary_of(trainer):
    return json.loads((Path(trainer.args.output_dir) / "selection" / "summary.json").read_text())


# ---- log_by ----


@pytest.mark.parametrize("kind", ["dpo", "sft", "kto"])
def test_logged_by_source(make_trainer, kind):
    dataset = tiny.DATASETS[kind]().select(range(16)).add_column("source", ["web", "a/b"] * 8)
    stock = make_trainer(kind, dataset=dataset)
    stock.train()
    trainer = make_trainer(kind, dataset=dataset)
    trainer.add_callback(SelectionCallback(trainer, "uniform", log_by="source"))
    trainer.train()
    assert tiny.losses_of(trainer) == tiny.losses_of(stock), "logging changes nothing"
    rows = [row for row in trainer.state.log_history if "loss" in row]
    names = {"loss", "weight", "tokens", "kept_fraction"} | ({"margin"} if kind != "sft" else set())
    for group in ("web", "a%2Fb"):
        found = {key.split("/")[-1] for row in rows for key in row if key.startswith(f"selection/source={group}/")}
        assert found == names
    totals = summary_of(trainer)["log_by"]["source"]
    assert totals == {value: {"examples": 8, "examples_trained": 8} for value in ("a/b", "web")}


def test_kept_shares_by_source(make_trainer):
    difficulty = np.arange(16) / 16
    dataset = tiny.completions(16).remove_columns("difficulty").add_column("difficulty", difficulty)
    dataset = dataset.add_column("source", ["easy"] * 4 + ["hard"] * 12)
    trainer = make_trainer("sft", dataset=dataset)
    parameters = {"by": "column", "column": "difficulty", "action": "keep_top", "keep": 0.5}
    trainer.add_callback(SelectionCallback(trainer, "curriculum", log_by="source", **parameters))
    trainer.train()
    row = trainer.state.log_history[0]
    assert row["selection/source=easy/kept_fraction"] == 1.0
    assert row["selection/source=hard/kept_fraction"] == pytest.approx(1 / 3)
    assert summary_of(trainer)["log_by"]["source"]["hard"] == {"examples": 12, "examples_trained": 4}


def test_a_column_that_cannot_be_logged_by(make_trainer):
    for column, message in (("sourse", "no such column"), ("weight", "texts are needed")):
        trainer = make_trainer("dpo", dataset=tiny.preferences(8))
        stock = type(trainer)
        with pytest.raises(ValueError, match=message):
            SelectionCallback(trainer, "uniform", log_by=column)
        assert type(trainer) is stock
    stream = make_trainer("sft", dataset=tiny.completions(8).to_iterable_dataset(), max_steps=2)
    with pytest.raises(ValueError, match="log_by='source' needs the rows of a dataset, but this one is a stream"):
        SelectionCallback(stream, "uniform", log_by="source")


# ---- Identical pairs ----


def doubled(size=12, same=(1, 5, 6)):
    """Pairs of which some have twice the same response."""
    rows = tiny.preferences(size)
    return rows.map(lambda row, i: {"rejected": row["chosen"]} if i in same else {}, with_indices=True)


def told(caplog):
    return [record for record in caplog.records if "two sides that are equal" in record.getMessage()]


def test_identical_pairs_are_counted_and_warned_of(make_trainer, caplog):
    trainer = make_trainer("dpo", dataset=doubled())
    stock = make_trainer("dpo", dataset=doubled())
    stock.train()
    with caplog.at_level(logging.INFO, logger="dsel_trl"):
        trainer.add_callback(SelectionCallback(trainer, "uniform"))
        trainer.train()
    tiny.assert_same_weights(tiny.weights_of(trainer), tiny.weights_of(stock))
    (record,) = told(caplog)
    assert record.levelno == logging.WARNING
    assert "3 of 12 pairs" in record.getMessage()
    assert "max_length=64" in record.getMessage()
    assert summary_of(trainer)["examples_identical"] == 3
    assert trainer.selection.ledger.visits.tolist() == [1] * 12


@pytest.mark.parametrize("method", [("uniform", {}), ("random", {"keep": 0.5}), ("margin", {"source": "explicit"})])
def test_identical_pairs_are_left_out(make_trainer, caplog, method):
    name, parameters = method
    trainer = make_trainer("dpo", dataset=doubled(), num_train_epochs=2)
    with caplog.at_level(logging.INFO, logger="dsel_trl"):
        trainer.add_callback(SelectionCallback(trainer, name, identical="drop", **parameters))
        trainer.train()
    assert not told(caplog)
    ledger = trainer.selection.ledger
    assert not ledger.visits[[1, 5, 6]].any()
    assert ledger.visits.sum() > 0
    assert set(ledger.to_dataset()["dropped_by"]) & {"identical"}
    if name == "uniform":
        assert ledger.visits.tolist() == [0 if i in (1, 5, 6) else 2 for i in range(12)]


def test_truncation_makes_pairs_identical(make_trainer):
    def cut(row):
        return {"prompt": "w1 w2", "chosen": " w3 w4 w5 w6", "rejected": " w3 w4 w7 w8"}

    trainer = make_trainer("dpo", dataset=tiny.preferences(8).map(cut), max_length=4, max_steps=1)
    trainer.add_callback(SelectionCallback(trainer, "uniform"))
    trainer.train()
    assert summary_of(trainer)["examples_identical"] == 8
    gone = make_trainer("dpo", dataset=tiny.preferences(8).map(cut), max_length=4, max_steps=1)
    SelectionCallback(gone, "uniform", identical="drop")
    with pytest.raises(
        ValueError,
        match=r"Nothing is left to train on after 'identical' chose|An epoch of 0 examples cannot be served",
    ):
        gone.train()


def test_without_identical_pairs_drop_is_stock(make_trainer):
    stock = make_trainer("dpo", dataset=tiny.preferences(9))
    stock.train()
    trainer = make_trainer("dpo", dataset=tiny.preferences(9))
    trainer.add_callback(SelectionCallback(trainer, "uniform", identical="drop"))
    trainer.train()
    tiny.assert_same_weights(tiny.weights_of(trainer), tiny.weights_of(stock))


def test_identical_is_of_pairs(make_trainer):
    with pytest.raises(ValueError, match="identical='drop' is of pairs, which SFTTrainer does not train on"):
        SelectionCallback(make_trainer("sft"), "uniform", identical="drop")
    with pytest.raises(ValueError, match=r"identical='dorp' is none of \['warn', 'drop'\].*'drop'"):
        SelectionCallback(make_trainer("dpo"), "uniform", identical="dorp")
