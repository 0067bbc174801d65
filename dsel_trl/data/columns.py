"""Reading whole columns of a `datasets.Dataset` as arrays, and telling two datasets apart by their content."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset

TRUTH_PREFIX = "truth_"
# Position of a row in the dataset that the user named, which survives what a trainer does to prepare it.
ROW_NUMBER = "dsel_row_number"


def refuse_truth(name: str) -> None:
    """Raises `ValueError` for a column that holds the answers a comparison is judged by."""
    if name.startswith(TRUTH_PREFIX):
        raise ValueError(f"Column {name!r} holds the answers a comparison is judged by: no method may read it.")


def column_names(dataset: Dataset | IterableDataset) -> list[str]:
    """Names of the columns; a streamed dataset that does not know them is asked for its first row."""
    if dataset.column_names is not None:
        return list(dataset.column_names)
    return list(next(iter(dataset)))


def _arrow_column(dataset: Dataset, name: str) -> pa.ChunkedArray:
    """The column in the order of the dataset's rows, without copying other columns."""
    rows = dataset.select_columns([name]).with_format("arrow")[:]
    return rows.column(name)


def numeric_column(dataset: Dataset, name: str) -> np.ndarray:
    """
    A numeric or boolean column as `float64`; null becomes NaN.

    Raises:
        `ValueError`: if the column is absent or holds something else than numbers; the message lists what is there.
    """
    if name not in dataset.column_names:
        raise ValueError(f"The dataset has no column {name!r}. Its columns are {sorted(dataset.column_names)}.")
    column = _arrow_column(dataset, name)
    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type) or pa.types.is_boolean(column.type)):
        raise ValueError(f"Column {name!r} holds {column.type}, but numbers are needed.")
    return pc.cast(column, pa.float64()).to_numpy(zero_copy_only=False).astype(np.float64)


def text_codes(dataset: Dataset, name: str) -> tuple[list[str], np.ndarray]:
    """
    The values of a column of texts (or whole numbers, or booleans), sorted, and each row's position among them.

    A null counts as the value `null`.

    Raises:
        `ValueError`: if the column holds something else.
    """
    column = _arrow_column(dataset, name).combine_chunks()
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    textual = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    if not (textual or pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_null(kind)):
        raise ValueError(f"Column {name!r} holds {kind}, but texts are needed.")
    encoded = pc.fill_null(column.cast(pa.large_string()), "null").dictionary_encode()
    values = encoded.dictionary.to_pylist()
    order = np.argsort(np.array(values, dtype=object), kind="stable")
    places = np.empty(len(values), dtype=np.int32)
    places[order] = np.arange(len(values))
    return [values[i] for i in order], places[encoded.indices.to_numpy(zero_copy_only=False)]


def plain_column(dataset: Dataset, name: str) -> list[Any]:
    """A column as the user stored it: texts and messages, whatever the format or transform of the dataset makes."""
    return list(dataset.select_columns([name]).with_format(None)[name])


def list_lengths(dataset: Dataset, name: str) -> np.ndarray:
    """Number of items of each row of a list column, `int32` of shape `(N,)`."""
    lengths = pc.list_value_length(_arrow_column(dataset, name))
    return pc.fill_null(lengths, 0).to_numpy(zero_copy_only=False).astype(np.int32)
