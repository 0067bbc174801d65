"""Reading whole columns of a `datasets.Dataset` as arrays, and telling two datasets apart by their content."""

import hashlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset

# Rows hashed of a dataset whose tokens do not fit this budget: evenly spaced, so that a changed shard is noticed.
FINGERPRINT_ROWS = 65_536
FINGERPRINT_TOKENS = 64_000_000
TOKEN_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids", "input_ids", "labels", "completion_ids", "label")


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


def list_lengths(dataset: Dataset, name: str) -> np.ndarray:
    """Number of items of each row of a list column, `int32` of shape `(N,)`."""
    lengths = pc.list_value_length(_arrow_column(dataset, name))
    return pc.fill_null(lengths, 0).to_numpy(zero_copy_only=False).astype(np.int32)


def original_positions(dataset: Dataset) -> np.ndarray | None:
    """
    Position of each row in the dataset the user passed, where it can be known, else `None`.

    TRL drops over-long rows while it prepares a dataset; a column `example_id`, or the index table that `filter` and
    `shuffle` leave behind, still says where a row came from.
    """
    if "example_id" in dataset.column_names:
        return numeric_column(dataset, "example_id").astype(np.int64)
    if dataset._indices is not None:
        return dataset._indices.column(0).to_numpy().astype(np.int64)
    return None


def dataset_fingerprint(dataset: Dataset, columns: Sequence[str] = ()) -> str:
    """
    Hash of what training reads of a dataset: its number of rows, token columns and the numeric `columns` given.

    Every row counts up to 64 million tokens; beyond that 65,536 evenly spaced rows do. The hash depends on values
    only, not on how or where the table is stored.
    """
    digest = hashlib.sha256(f"rows={len(dataset)}".encode())
    token_columns = [name for name in TOKEN_COLUMNS if name in dataset.column_names]
    if token_columns and len(dataset):
        probe = dataset.select(range(min(len(dataset), 256)))
        per_row = sum(int(_row_sizes(probe, name).sum()) for name in token_columns) / len(probe)
        rows = dataset
        if per_row * len(dataset) > FINGERPRINT_TOKENS:
            rows = dataset.select(np.linspace(0, len(dataset) - 1, FINGERPRINT_ROWS).astype(np.int64))
        for name in token_columns:
            column = _arrow_column(rows, name).combine_chunks()
            digest.update(name.encode())
            digest.update(_row_sizes(rows, name).tobytes())
            if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
                column = column.flatten()
            digest.update(column.to_numpy(zero_copy_only=False).astype(np.int64).tobytes())
    for name in sorted(set(columns)):
        digest.update(name.encode())
        digest.update(numeric_column(dataset, name).tobytes())
    return digest.hexdigest()


def column_hash(dataset: Dataset, name: str) -> str:
    """Hash of all values of a column of numbers or of lists of numbers."""
    digest, column = hashlib.sha256(), _arrow_column(dataset, name).combine_chunks()
    while pa.types.is_nested(column.type):
        digest.update(pc.fill_null(pc.list_value_length(column), -1).to_numpy(zero_copy_only=False).tobytes())
        column = column.flatten()
    digest.update(pc.cast(column, pa.float64()).to_numpy(zero_copy_only=False).tobytes())
    return digest.hexdigest()


def _row_sizes(dataset: Dataset, name: str) -> np.ndarray:
    column_type = dataset.select_columns([name]).with_format("arrow")[:0].column(name).type
    if pa.types.is_list(column_type) or pa.types.is_large_list(column_type):
        return list_lengths(dataset, name)
    return np.ones(len(dataset), dtype=np.int32)


def response_lengths(
    dataset: Dataset, max_length: int | None, sides: Sequence[str] = ("chosen", "rejected")
) -> tuple[np.ndarray, np.ndarray]:
    """
    Completion tokens and trained tokens of each row's tokenised responses, after truncation to `max_length`.

    Args:
        dataset ([`~datasets.Dataset`]):
            Tokenised rows.
        max_length (`int`, *optional*):
            What each response is truncated to, with its prompt.
        sides (`Sequence[str]`, *optional*, defaults to `("chosen", "rejected")`):
            Which responses a row has: both sides of a pair, counted together, or a single `"completion"`.

    Returns:
        Two `int32` arrays of shape `(N,)`.
    """
    # Pairs for a reward model hold the prompt in both sides.
    with_prompt = "prompt_ids" in dataset.column_names
    prompt = list_lengths(dataset, "prompt_ids") if with_prompt else np.zeros(len(dataset), dtype=np.int32)
    totals = np.stack([prompt + list_lengths(dataset, f"{side}_ids") for side in sides])
    if max_length is not None:
        totals = np.minimum(totals, max_length)
    completions = np.maximum(totals - prompt, 0)
    return completions.sum(axis=0, dtype=np.int32), totals.sum(axis=0, dtype=np.int32)


def sequence_lengths(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Tokens that carry loss and all tokens of each tokenised sequence; two `int32` arrays of shape `(N,)`."""
    total = list_lengths(dataset, "input_ids")
    if "labels" not in dataset.column_names:
        return total, total
    labels = _arrow_column(dataset, "labels").combine_chunks().flatten().to_numpy(zero_copy_only=False)
    ends = np.cumsum(total, dtype=np.int64)
    trained = np.concatenate([[0], np.cumsum(labels != -100)])
    return (trained[ends] - trained[ends - total]).astype(np.int32), total
