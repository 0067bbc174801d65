"""What a finished run says of itself: its files, read back, and what a report asks of them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from ..core.ledger import Ledger

# Columns of the ledger's table that are no scores.
OTHER_COLUMNS = {
    "id",
    "weight",
    "visits",
    "last_step",
    "dropped_by",
    "decided_by",
    "decision_score",
    "decision_step",
    "reason",
}


@dataclass
class RunRecord:
    """
    A finished run.

    Attributes:
        name (`str`):
            What it is called beside others.
        summary (`dict`):
            `summary.json`.
        history (`list[dict]`):
            `history.json`: what was known each time the trainer logged.
        table (`dict[str, np.ndarray]`):
            `ledger.parquet` by column, `(N,)` each.
    """

    name: str
    summary: dict[str, Any]
    history: list[dict[str, Any]]
    table: dict[str, np.ndarray]

    @classmethod
    def of(cls, ledger: Ledger, summary: dict[str, Any], history: list[dict[str, Any]]) -> "RunRecord":
        """The record of a run whose ledger is at hand."""
        return cls("", summary, history, _arrays(ledger.to_table()))

    @classmethod
    def read(cls, folder: Path) -> "RunRecord":
        """
        Reads what a run has left in its output folder (or in the folder `selection` inside it).

        Raises:
            `FileNotFoundError`: if there is no finished run.
        """
        place = folder if (folder / "ledger.parquet").is_file() else folder / "selection"
        if not (place / "ledger.parquet").is_file() or not (place / "summary.json").is_file():
            found = sorted(str(path.parent.parent) for path in folder.glob("**/selection/ledger.parquet"))
            hint = f" There are runs in {', '.join(found[:3])}." if found else ""
            raise FileNotFoundError(
                f"{str(folder)!r} holds no finished run with a selection (no selection/ledger.parquet).{hint}"
            )
        table = _arrays(parquet.read_table(place / "ledger.parquet"))
        history = place / "history.json"
        rows = json.loads(history.read_text(encoding="utf-8"))["rows"] if history.is_file() else []
        summary = json.loads((place / "summary.json").read_text(encoding="utf-8"))
        output = place.parent if place.name == "selection" else place
        return cls(output.resolve().name, summary, rows, _with_decisions(table))

    @property
    def methods(self) -> list[str]:
        return [method["name"] for method in self.summary["methods"]]

    @property
    def title(self) -> str:
        return " + ".join(self.methods)

    @property
    def dropped(self) -> np.ndarray:
        """Whether each example was dropped at the end, `(N,)` bool."""
        return self.table["dropped_by"] != ""

    @property
    def visits(self) -> np.ndarray:
        return self.table["visits"]

    @property
    def scores(self) -> list[str]:
        """Names of the score columns that hold anything, those of the methods first."""
        names = [name for name in self.table if name not in OTHER_COLUMNS and np.isfinite(self.table[name]).any()]
        return sorted(names, key=lambda name: name.split("_")[0] not in self.methods and name not in self.methods)

    @property
    def deciding(self) -> tuple[str, np.ndarray]:
        """
        The score that decided last on most examples, by its method's name, and its values `(N,)`; where no score did,
        the first score there is.
        """
        decided = self.table["decided_by"]
        names, counts = np.unique(decided[decided != ""].astype(str), return_counts=True)
        if len(names):
            name = str(names[counts.argmax()])
            values = np.where(decided == name, self.table["decision_score"], np.nan)
            if np.isfinite(values).any():
                return name, values
        own = [name for name in (*self.methods, "loss") if name in self.scores]
        return (own[0], self.table[own[0]]) if own else ("", np.full(len(self.visits), np.nan))

    @property
    def weights(self) -> np.ndarray:
        """Last gradient weight of each example, `(N,)`, NaN where it was not weighted."""
        return self.table.get("weight", np.full(len(self.visits), np.nan))


def _arrays(table: pa.Table) -> dict[str, np.ndarray]:
    return {name: table.column(name).to_numpy() for name in table.column_names}


def _with_decisions(table: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The table of an earlier version's run, which did not write down what decided."""
    size = len(table["id"])
    blank = {
        "decided_by": np.full(size, "", dtype=object),
        "decision_score": np.full(size, np.nan, dtype=np.float32),
        "decision_step": np.full(size, -1, dtype=np.int32),
        "reason": table["dropped_by"],
    }
    return {**blank, **table}


def read_stream(folder: Path) -> dict[str, Any] | None:
    """`summary.json` of a run with `stages`, or `None` for another folder."""
    file = folder / "selection" / "summary.json"
    if not file.is_file():
        return None
    summary: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return summary if "stages" in summary else None
