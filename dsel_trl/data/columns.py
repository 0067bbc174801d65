"""Reading columns of a dataset for a method: in one place, which keeps the truth of a test from all of them."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset
from datasets.formatting import query_table

# Columns with what a comparison is judged by: a method that reads them has the answers.
TRUTH_PREFIX = "truth_"
# Position of a row in the dataset that the user named, which survives what a trainer does to prepare it.
ROW_NUMBER = "dsel_row_number"


def refuse_truth(name: str) -> None:
    """Raises `ValueError` for a column with the truth of a test."""
    if name.startswith(TRUTH_PREFIX):
        raise ValueError(f"Column {name!r} holds the answers a comparison is judged by: no method may read it.")


def check_column(dataset: Dataset, name: str, reader: str = "") -> None:
    """Raises `ValueError` for a column that a method may not read or that is not there; `reader` says who asks."""
    refuse_truth(name)
    if name not in dataset.column_names:
        who = f"{reader}: the" if reader else "The"
        raise ValueError(f"{who} dataset has no column {name!r}. Its columns are {sorted(dataset.column_names)}.")


def column_values(dataset: Dataset, name: str, reader: str = "") -> Any:
    """A column as the user stored it, for any method; for errors see [`check_column`]."""
    check_column(dataset, name, reader)
    return plain_column(dataset, name)


def without_truth(row: dict[str, Any]) -> dict[str, Any]:
    """What a user's function may see of a row."""
    return {name: value for name, value in row.items() if not name.startswith(TRUTH_PREFIX)}


def column_names(dataset: Dataset | IterableDataset) -> list[str]:
    """Names of the columns; a streamed dataset that does not know them is asked for its first row."""
    if dataset.column_names is not None:
        return list(dataset.column_names)
    return list(next(iter(dataset)))


def _arrow_column(dataset: Dataset, name: str) -> pa.ChunkedArray:
    """The column in the order of the dataset's rows, without copying other columns."""
    check_column(dataset, name)
    # Not by way of a dataset of this column alone: making one takes longer than reading it.
    return query_table(dataset.data.select([name]), slice(None), dataset._indices).column(name)


def numeric_column(dataset: Dataset, name: str) -> np.ndarray:
    """
    A numeric or boolean column as `float64`; null becomes NaN.

    Raises:
        `ValueError`: if the column is absent or holds something else than numbers; the message lists what is there.
    """
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


def codes(dataset: Dataset, name: str) -> np.ndarray:
    """A number for every different value of a column of any type, `int64` of shape `(N,)`; null is a value too."""
    column = _arrow_column(dataset, name)
    encoded = pa.chunked_array(column.chunks).combine_chunks().dictionary_encode(null_encoding="encode")
    return encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64)


def is_list_column(dataset: Dataset, name: str) -> bool:
    """Whether the rows of a column are lists, of any or of a fixed size."""
    kind = _arrow_column(dataset, name).type
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def list_lengths(dataset: Dataset, name: str) -> np.ndarray:
    """Number of items of each row of a list column, `int32` of shape `(N,)`."""
    lengths = pc.list_value_length(_arrow_column(dataset, name))
    return pc.fill_null(lengths, 0).to_numpy(zero_copy_only=False).astype(np.int32)
