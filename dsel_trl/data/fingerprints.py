"""Telling two datasets apart by their content."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from .columns import _arrow_column, is_list_column, numeric_column

# Rows hashed of a dataset that does not fit this budget: evenly spaced, so that a changed shard is noticed.
FINGERPRINT_ROWS = 65_536
# Bytes of all values: 64 million tokens.
FINGERPRINT_BYTES = 512_000_000
PROBE_ROWS = 256


def dataset_fingerprint(dataset: Dataset, trained: Sequence[str], columns: Sequence[str] = ()) -> str:
    """
    Hash of what training reads of a dataset.

    Every row counts up to half a gigabyte (64 million tokens); beyond that evenly spaced rows do, as many as fit, at
    most 65,536. The hash depends on values only, not on how or where the table is stored.

    Args:
        dataset ([`~datasets.Dataset`]):
            The rows.
        trained (`Sequence[str]`):
            Columns of any type that are trained on.
        columns (`Sequence[str]`, *optional*):
            Columns of numbers, or of lists of them, that decide about training: each of their values counts.
    """
    digest = hashlib.sha256(f"rows={len(dataset)}".encode())
    if trained and len(dataset):
        # The probe tells what a row takes; images and texts vary more than tokens, so it looks at the whole table.
        probe = dataset
        if len(dataset) > PROBE_ROWS:
            probe = dataset.select(np.linspace(0, len(dataset) - 1, PROBE_ROWS).astype(np.int64))
        per_row = sum(_arrow_column(probe, name).nbytes for name in trained) / len(probe)
        rows = dataset
        if per_row * len(dataset) > FINGERPRINT_BYTES:
            fitting = min(FINGERPRINT_ROWS, max(1, int(FINGERPRINT_BYTES / per_row)))
            rows = dataset.select(np.linspace(0, len(dataset) - 1, fitting).astype(np.int64))
        for name in trained:
            digest.update(name.encode())
            update_with_values(digest, _arrow_column(rows, name))
    for name in sorted(set(columns)):
        digest.update(name.encode())
        if is_list_column(dataset, name):
            update_with_values(digest, _arrow_column(dataset, name))
        else:
            digest.update(numeric_column(dataset, name).tobytes())
    return digest.hexdigest()


def column_hash(dataset: Dataset, name: str) -> str:
    """Hash of all values of a column, of whatever type."""
    digest = hashlib.sha256()
    update_with_values(digest, _arrow_column(dataset, name))
    return digest.hexdigest()


def update_with_values(digest: Any, column: pa.ChunkedArray | pa.Array) -> None:
    """
    Adds the values of a column of any type to a hash: numbers, texts, dates, lists of all of them, structures, nulls.

    Types that differ in width alone (`int32` and `int64`, `string` and `large_string`, lists of a fixed size and of
    any) hash alike.
    """
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
        if isinstance(column, pa.ChunkedArray):
            # Too large for one array of its type: texts of more than two gigabytes.
            for chunk in column.chunks:
                update_with_values(digest, chunk)
            return
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    if pa.types.is_null(kind):
        digest.update(f"null={len(column)}".encode())
        return
    if column.null_count:
        digest.update(b"null")
        digest.update(np.packbits(column.is_null().to_numpy(zero_copy_only=False)).tobytes())
    if pa.types.is_struct(kind):
        # Unlike `field`, `flatten` gives null for what lies behind a null row.
        for field, values in zip(kind, column.flatten(), strict=True):
            digest.update(field.name.encode())
            update_with_values(digest, values)
    elif pa.types.is_map(kind) or pa.types.is_nested(kind):
        digest.update(b"list")
        _update_with_lists(digest, column)
    else:
        _update_with_plain(digest, column)


def _update_with_lists(digest: Any, column: pa.Array) -> None:
    if pa.types.is_map(column.type):
        column = column.cast(pa.list_(pa.struct([("key", column.type.key_type), ("value", column.type.item_type)])))
    if not hasattr(column, "flatten") or pa.types.is_union(column.type):
        digest.update(repr(column.to_pylist()).encode())
        return
    lengths = pc.fill_null(pc.list_value_length(column), 0)
    digest.update(lengths.to_numpy(zero_copy_only=False).astype(np.int64).tobytes())
    # Unlike `values`, `flatten` leaves out what lies behind null.
    update_with_values(digest, column.flatten())


def _update_with_plain(digest: Any, column: pa.Array) -> None:
    kind = column.type
    if pa.types.is_boolean(kind) or pa.types.is_integer(kind):
        digest.update(b"integer")
        values = pc.fill_null(column.cast(pa.int8()) if pa.types.is_boolean(kind) else column, 0)
        digest.update(values.to_numpy(zero_copy_only=False).astype(np.int64).tobytes())
    elif pa.types.is_floating(kind):
        digest.update(b"float")
        values = pc.fill_null(column.cast(pa.float64()), 0.0)
        digest.update(values.to_numpy(zero_copy_only=False).tobytes())
    elif pa.types.is_string(kind) or pa.types.is_binary(kind) or pa.types.is_large_string(kind):
        _update_with_bytes(digest, column.cast(pa.large_binary()))
    elif pa.types.is_large_binary(kind):
        _update_with_bytes(digest, column)
    elif pa.types.is_fixed_size_binary(kind):
        _update_with_bytes(digest, column.cast(pa.binary()).cast(pa.large_binary()))
    else:
        # Dates, times, decimals: all of them can be written.
        digest.update(str(kind).encode())
        _update_with_bytes(digest, column.cast(pa.string()).cast(pa.large_binary()))


def _update_with_bytes(digest: Any, column: pa.Array) -> None:
    column = pc.fill_null(column, b"")
    digest.update(b"text")
    digest.update(pc.binary_length(column).to_numpy(zero_copy_only=False).astype(np.int64).tobytes())
    offsets = np.frombuffer(column.buffers()[1], dtype=np.int64)[column.offset : column.offset + len(column) + 1]
    if len(column) and column.buffers()[2] is not None:
        digest.update(memoryview(column.buffers()[2])[int(offsets[0]) : int(offsets[-1])])
