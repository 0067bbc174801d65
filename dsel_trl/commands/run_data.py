"""The rows that a finished run was trained on, read again: for its report and its export."""

from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from ..data.loading import DEMO, load_splits, take_split
from ..data.responses import message_text
from ..report.record import RunRecord
from ..trainer.kinds import KINDS

# Columns that say something, in the order of reading.
SAID = ("prompt", "chosen", "rejected", "completion", "messages", "conversations", "text")
# The longest text that a page shows of an example.
LONGEST = 1500


def source_of(name: str, split: str, config: str | None) -> dict[str, Any]:
    """Where a run's rows come from, as `summary.json` has it; a local file by its whole path."""
    path = Path(name).expanduser()
    return {"name": str(path.resolve()) if name != DEMO and path.exists() else name, "split": split, "config": config}


def rows_of(record: RunRecord, dataset_name: str | None = None, split: str | None = None) -> Dataset:
    """
    The user's dataset of a run.

    Args:
        record ([`~dsel_trl.report.record.RunRecord`]):
            The run.
        dataset_name, split (`str`, *optional*):
            Where it is; by default where the run has read it.

    Raises:
        `ValueError`: if the run does not say where, was a stream, or the dataset is too short to be the run's.
        `FileNotFoundError`: if there is no such dataset.
    """
    source = record.summary.get("dataset") or {}
    name = dataset_name or source.get("name")
    if name is None:
        raise ValueError(
            f"The run {record.name!r} does not say which dataset it was trained on (it was started from Python, or on "
            "a mixture): give --dataset_name."
        )
    kind = KINDS[record.summary.get("kind", "dpo")]
    splits = load_splits(name, demo=kind.demo, config=source.get("config"))
    rows = take_split(splits, split or source.get("split") or "train", name, "dataset_train_split")
    ids = record.table["id"]
    if not isinstance(rows, Dataset) or (len(ids) and (ids.min() < 0 or ids.max() >= len(rows))):
        raise ValueError(
            f"{name!r} has {len(rows)} rows, but the ledger of {record.name!r} speaks of row {ids.max()}: it was "
            "another dataset, or a stream. Give the right one with --dataset_name."
        )
    size = source.get("rows")
    if dataset_name is None and size is not None and size != len(rows):
        raise ValueError(
            f"{name!r} has {len(rows)} rows now, but had {size} when {record.name!r} was trained: it has changed. "
            "Give the one of then with --dataset_name."
        )
    return rows


def row_texts(row: dict[str, Any]) -> list[tuple[str, str]]:
    """What a row says, as (column, text); of a long text the beginning."""
    return [(name, _cut(_text(row[name]))) for name in SAID if row.get(name) is not None]


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if len(value) == 1 and isinstance(value[0], dict):
        return message_text(value[0])
    return "\n".join(f"{m.get('role', m.get('from', ''))}: {message_text(m) or m.get('value', '')}" for m in value)


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} … ({len(text) - LONGEST:,} more characters)"


def text_values(rows: Dataset, column: str, ids: np.ndarray) -> np.ndarray:
    """The values of a column of some rows as texts, `(len(ids),)`."""
    values = rows.select_columns([column])[:][column]
    return np.array([str(values[i]) for i in ids])
