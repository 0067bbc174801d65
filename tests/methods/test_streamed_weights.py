"""Weights of a stream: what a column cannot mean is an error that names the column and the value."""

import numpy as np
import pytest
from datasets import Dataset

from dsel_trl import SelectionCallback
from tests import tiny


def streamed(make_trainer, kind, weights, **parameters):
    rows = tiny.DATASETS[kind]().select(range(len(weights))).remove_columns("weight")
    rows = Dataset.from_list([{**row, "weight": weight} for row, weight in zip(rows, weights, strict=True)])
    trainer = make_trainer(kind, dataset=rows.to_iterable_dataset(), max_steps=len(weights) // 2)
    trainer.add_callback(SelectionCallback(trainer, "weight_column", **parameters))
    return trainer


BAD = {
    "negative": ([1.0, 1.0, 1.0, -0.5], r"'weight' of the stream holds the negative weight -0\.5.*allow_negative"),
    "null": ([1.0, None, 1.0, 1.0], r"'weight' of the stream holds nan \(null"),
    "not a number": ([1.0, 1.0, float("nan"), 1.0], r"'weight' of the stream holds nan"),
    "infinite": ([1.0, float("inf"), 1.0, 1.0], r"'weight' of the stream holds inf"),
    "text": (["high", "low", "high", "low"], r"'weight' of the stream holds 'high', but numbers"),
    "number as text": (["1.0", "0.5", "1.0", "0.5"], r"'weight' of the stream holds '1\.0', but numbers"),
    "list": ([[1.0, 2.0]] * 4, r"'weight' of the stream holds \[1\.0, 2\.0\], but numbers"),
    "zero": ([0.0] * 4, r"'weight' of the stream is 0 in all 2 examples of the first step"),
}


@pytest.mark.parametrize("kind", ["dpo", "sft"])
@pytest.mark.parametrize("bad", BAD)
def test_what_a_weight_cannot_be(make_trainer, kind, bad):
    weights, message = BAD[bad]
    trainer = streamed(make_trainer, kind, weights)
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_negative_weights_that_are_meant(make_trainer):
    trainer = streamed(make_trainer, "dpo", [1.0, -0.5, 0.0, 2.0], allow_negative=True, normalize="none")
    trainer.train()
    ledger = trainer.selection.ledger
    assert sorted(ledger["weight"][: len(ledger)].tolist()) == [-0.5, 0.0, 1.0, 2.0]


def test_integers_and_booleans_are_numbers(make_trainer):
    for weights in ([1, 2, 3, 4], [True, False, True, True]):
        trainer = streamed(make_trainer, "sft", weights, normalize="none")
        trainer.train()
        ledger = trainer.selection.ledger
        assert sorted(ledger["weight"][: len(ledger)].tolist()) == sorted(np.float32(weights).tolist())
