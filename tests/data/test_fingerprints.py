"""Two datasets are told apart by what they hold, whatever its type and however it is stored."""

import datetime
import decimal

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset

from dsel_trl.data import fingerprints
from dsel_trl.data.fingerprints import column_hash, dataset_fingerprint

COLUMNS = {
    "integers": (pa.array([1, 2, None]), pa.array([1, 3, None])),
    "booleans": (pa.array([True, False, None]), pa.array([True, True, None])),
    "floats": (pa.array([0.5, 1.5, None]), pa.array([0.5, 2.5, None])),
    "texts": (pa.array(["safe", "unsafe", None]), pa.array(["safe", "unsafe!", None])),
    "shifted texts": (pa.array(["ab", "c"]), pa.array(["a", "bc"])),
    "empty or missing": (pa.array(["a", ""]), pa.array(["a", None])),
    "nulls": (pa.nulls(2), pa.nulls(3)),
    "lists of text": (pa.array([["a", "b"], None, []]), pa.array([["a"], ["b"], []])),
    "structures": (pa.array([{"a": 1, "b": "x"}, None]), pa.array([{"a": 1, "b": "y"}, None])),
    "messages": (pa.array([[{"role": "user", "content": "x"}]]), pa.array([[{"role": "user", "content": "y"}]])),
    "fixed-size lists": (
        pa.array([[1.0, 2.0], None], pa.list_(pa.float32(), 2)),
        pa.array([[1.0, 3.0], None], pa.list_(pa.float32(), 2)),
    ),
    "dates": (pa.array([datetime.date(2024, 1, 1)]), pa.array([datetime.date(2024, 1, 2)])),
    "decimals": (pa.array([decimal.Decimal("1.20")]), pa.array([decimal.Decimal("1.21")])),
    "bytes": (pa.array([b"ab"], pa.binary(2)), pa.array([b"ac"], pa.binary(2))),
}


def table(values):
    return Dataset(pa.table({"column": values}))


@pytest.mark.parametrize("kind", COLUMNS)
def test_columns_of_any_type(kind):
    first, second = (table(values) for values in COLUMNS[kind])
    assert column_hash(first, "column") == column_hash(table(COLUMNS[kind][0]), "column")
    assert column_hash(first, "column") != column_hash(second, "column")
    assert dataset_fingerprint(first, ["column"]) != dataset_fingerprint(second, ["column"])


@pytest.mark.parametrize(
    ("stored", "otherwise"),
    [
        (pa.array([1, 2], pa.int64()), pa.array([1, 2], pa.int32())),
        (pa.array(["a", None]), pa.array(["a", None], pa.large_string())),
        (pa.array(["a", "b", "a"]), pa.array(["a", "b", "a"]).dictionary_encode()),
        (pa.array([[1, 2], None]), pa.array([[1, 2], None], pa.list_(pa.int64(), 2))),
    ],
)
def test_how_values_are_stored_does_not_count(stored, otherwise):
    assert column_hash(table(stored), "column") == column_hash(table(otherwise), "column")


def test_views_and_chunks_do_not_count():
    whole = Dataset.from_dict({"column": [["a"], ["b", "c"], [], ["d"]]})
    view = Dataset.from_dict({"column": [["x"], ["d"], [], ["b", "c"], ["a"]]}).select([4, 3, 2, 1])
    assert column_hash(whole, "column") == column_hash(view, "column")


def test_beyond_the_budget_evenly_spaced_rows_count(monkeypatch):
    monkeypatch.setattr(fingerprints, "FINGERPRINT_BYTES", 8 * 100)
    rows = np.arange(1000)
    first = dataset_fingerprint(Dataset.from_dict({"number": rows}), ["number"])
    # A changed shard is noticed, one changed row between two that are looked at is not.
    shard, single = rows.copy(), rows.copy()
    shard[500:600], single[5] = 0, 0
    assert dataset_fingerprint(Dataset.from_dict({"number": shard}), ["number"]) != first
    assert dataset_fingerprint(Dataset.from_dict({"number": single}), ["number"]) == first


def test_what_is_not_trained_on_does_not_count():
    first = Dataset.from_dict({"input_ids": [[1], [2]], "label": ["safe", "unsafe"], "weight": [1.0, 2.0]})
    second = Dataset.from_dict({"input_ids": [[1], [2]], "label": ["unsafe", None], "weight": [1.0, 3.0]})
    assert dataset_fingerprint(first, ["input_ids"]) == dataset_fingerprint(second, ["input_ids"])
    assert dataset_fingerprint(first, ["input_ids"], ["weight"]) != dataset_fingerprint(
        second, ["input_ids"], ["weight"]
    )
