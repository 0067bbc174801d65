"""Telling two datasets apart by their content."""

import hashlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from .columns import _arrow_column, list_lengths, numeric_column

# Rows hashed of a dataset whose tokens do not fit this budget: evenly spaced, so that a changed shard is noticed.
FINGERPRINT_ROWS = 65_536


FINGERPRINT_TOKENS = 64_000_000


TOKEN_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids", "input_ids", "labels", "completion_ids", "label")


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
