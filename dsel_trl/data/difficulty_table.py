"""Tables of difficulty: which pair is how hard, as CSV or JSON, by row or by prompt."""

import csv
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..functional.preference.selective_dpo import stable_id, values_by_id
from .columns import plain_column
from .files import replacing, write_json
from .responses import message_text

PROMPT_ID, ROW_ID, DIFFICULTY = "prompt_id", "id", "learning_order"


def prompt_ids(dataset: Any) -> list[str]:
    """
    What identifies each row in a table that other programs made: its column `prompt_id`, else the sha256 of its first
    user message (of a plain prompt: of the text).
    """
    if PROMPT_ID in dataset.column_names:
        return [str(value) for value in dataset[PROMPT_ID]]
    if "prompt" not in dataset.column_names:
        return [str(row) for row in range(len(dataset))]
    return [stable_id(_first_user_text(prompt)) for prompt in plain_column(dataset, "prompt")]


def _first_user_text(prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    return next((message_text(message) for message in prompt if message["role"] == "user"), message_text(prompt[0]))


def write_table(path: str | os.PathLike, dataset: Any, columns: Mapping[str, np.ndarray]) -> None:
    """
    Writes `columns` (each `(N,)`) by row and prompt, as JSON or, by the file's name, CSV. It appears at once.

    Args:
        path (`str` or `os.PathLike`):
            The file.
        dataset ([`~datasets.Dataset`]):
            What the values are of.
        columns (`Mapping[str, np.ndarray]`):
            Among them `learning_order`, the difficulty (larger = harder). Rows without a difficulty are left out.
    """
    path, keys = Path(path), prompt_ids(dataset)
    rows = np.flatnonzero(np.isfinite(columns[DIFFICULTY]))
    table: dict[str, list[Any]] = {PROMPT_ID: [keys[row] for row in rows], ROW_ID: rows.tolist()}
    for name, values in columns.items():
        table[name] = [None if np.isnan(value) else float(value) for value in values[rows]]
    if path.suffix != ".csv":
        write_json(path, table)
        return
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(table)
        writer.writerows(zip(*table.values(), strict=True))


def read_table(path: str | os.PathLike, dataset: Any, column: str = DIFFICULTY) -> np.ndarray:
    """
    Reads one column of a table of difficulty.

    A row is found by its number (`id`) where the table's prompt at that number is the dataset's, else by its prompt: a
    table of another selection of the same data does not slip. Of rows that repeat a prompt the first counts.

    Returns:
        `np.ndarray` of shape `(N,)`, NaN where the table has no entry.

    Raises:
        `ValueError`: if the file cannot be read so, or names no row of the dataset.
    """
    path = Path(path)
    try:
        table = _columns(path)
        values = np.array([np.nan if v in (None, "") else float(v) for v in table[column]], dtype=np.float64)
        rows = np.array([int(v) for v in table[ROW_ID]], dtype=np.int64) if ROW_ID in table else None
        keys = [str(v) for v in table[PROMPT_ID]] if PROMPT_ID in table else None
        if rows is None and keys is None:
            raise KeyError(f"{PROMPT_ID} or {ROW_ID}")
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not a table with the columns {PROMPT_ID} (or {ROW_ID}) and {column}: "
            f"{type(error).__name__}: {error}."
        ) from error
    result = np.full(len(dataset), np.nan)
    own = prompt_ids(dataset) if keys is not None else []
    inside = rows is not None and bool(((rows >= 0) & (rows < len(dataset))).all())
    if rows is not None and keys is None and not inside:
        raise ValueError(f"{path} names the pair {rows.max()}, but the dataset has {len(dataset)} rows.")
    if rows is not None and (keys is None or (inside and all(own[r] == k for r, k in zip(rows, keys, strict=True)))):
        result[rows] = values
        return result
    assert keys is not None
    known = dict.fromkeys(keys)
    if not known.keys() & set(own):
        raise ValueError(
            f"{path}: none of its {len(known)} prompts is in the dataset (first: {next(iter(known), '')!r})."
        )
    return values_by_id(own, keys, values)


def table_columns(path: str | os.PathLike) -> set[str]:
    """Names of the columns of a table."""
    return set(_columns(Path(path)))


def _columns(path: Path) -> dict[str, list[Any]]:
    if path.suffix != ".csv":
        return dict(json.loads(path.read_text(encoding="utf-8")))
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {name: [row[name] for row in rows] for name in (rows[0] if rows else ())}
