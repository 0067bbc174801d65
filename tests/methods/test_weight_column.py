"""Weights of a dataset that is there whole: what a column cannot mean is an error that names column and row."""

import logging

import numpy as np
import pytest
from datasets import Dataset

from dsel_trl import SelectionCallback
from tests import tiny


def weighted(make_trainer, kind, weights, **parameters):
    rows = tiny.DATASETS[kind]().select(range(len(weights))).remove_columns("weight")
    rows = Dataset.from_list([{**row, "weight": weight} for row, weight in zip(rows, weights, strict=True)])
    trainer = make_trainer(kind, dataset=rows, max_steps=len(weights) // 2)
    trainer.add_callback(SelectionCallback(trainer, "weight_column", **parameters))
    return trainer


BAD = {
    "negative": ([1.0, 1.0, 1.0, -0.5], r"'weight' has 1 negative weights, the first -0\.5 at row 3.*allow_negative"),
    "missing everywhere": ([None, None, float("nan"), None], "'weight', read by 'weight_column', has no value at all"),
    "infinite": ([1.0, 1.0, float("inf"), 1.0], r"'weight' holds inf at row 2, but a weight is a finite number"),
    "infinite, against": ([1.0, float("-inf"), 1.0, 1.0], r"'weight' holds -inf at row 1"),
    "text": (["high", "low", "high", "low"], "'weight' holds string, but numbers are needed"),
    "list": ([[1.0], [2.0], [1.0], [1.0]], r"'weight' holds lists.*Set per='turn'"),
    "zero": ([0.0] * 4, "'weight' is zero everywhere: nothing would be trained"),
}


@pytest.mark.parametrize("kind", ["dpo", "sft"])
@pytest.mark.parametrize("bad", BAD)
def test_what_a_weight_cannot_be(make_trainer, kind, bad):
    weights, message = BAD[bad]
    with pytest.raises(ValueError, match=message):
        weighted(make_trainer, kind, weights).train()


def test_no_weight_in_a_list_is_infinite(make_trainer):
    trainer = weighted(make_trainer, "sft", [[1.0], [0.5], None, [float("inf")]], per="turn")
    with pytest.raises(ValueError, match=r"'weight' holds inf in the list of row 3"):
        trainer.train()


def test_rows_without_a_weight_are_left_out_and_told(make_trainer, caplog):
    trainer = weighted(make_trainer, "dpo", [1.0, None, 1.0, 0.5], normalize="none")
    with caplog.at_level(logging.WARNING, "dsel_trl"):
        trainer.train()
    told = "1 of 4 rows have no value in column 'weight'; they count as 0"
    assert sum(told in record.message for record in caplog.records) == 1
    np.testing.assert_array_equal(trainer.selection.ledger["weight"], [1.0, 0.0, 1.0, 0.5])
