"""The ledger: what a run knows of every example."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from datasets.table import InMemoryTable

GROWTH = 1024
# What the columns of a decision hold of an example on which there was none.
BLANK: dict[str, Any] = {"score": np.float32(np.nan), "step": np.int32(-1), "decider": np.uint8(0)}


class Ledger:
    """
    One float32 column per score with the step at which each entry was written; NaN = not known yet.

    Beside the scores it holds decisions: which score of an example decided last whether it is trained on, when, and by
    what rule, also for an example that was never visited.

    Memory: 8 bytes per example and score, 1 to 4 bytes per example for the visits, 1 byte once a reason to drop has
    been recorded, and 9 bytes once a score has decided. Every rank holds the same ledger.

    Args:
        size (`int`, *optional*):
            Number of examples. Without it (streams) rows are made as ids appear, and an id is any int64.

    Example:

    ```python
    >>> ledger = Ledger(3)
    >>> ledger.write("loss", [0, 2], [0.5, 0.1], step=10)
    >>> ledger["loss"]
    array([0.5, nan, 0.1], dtype=float32)
    ```
    """

    def __init__(self, size: int | None = None) -> None:
        self._scores: dict[str, np.ndarray] = {}
        self._steps: dict[str, np.ndarray] = {}
        self._rows: dict[int, int] | None = {} if size is None else None
        self.visits = np.zeros(size or 0, dtype=np.uint8)
        self.reasons: list[str] = [""]
        self.rules: dict[str, str] = {}
        self.pickers: list[str] = []
        self._dropped: np.ndarray | None = None
        # Score, step and decider (a position in `reasons`) of the last decision.
        self._decisions: dict[str, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self._rows) if self._rows is not None else len(self.visits)

    def __contains__(self, name: str) -> bool:
        return name in self._scores

    def __getitem__(self, name: str) -> np.ndarray:
        """The scores under `name`, `(N,)` float32 (the ledger's own array: copy before changing it)."""
        if name not in self._scores:
            raise KeyError(f"The ledger has no score {name!r}; it has {self.names}.")
        return self._scores[name][: len(self)]

    @property
    def names(self) -> list[str]:
        return list(self._scores)

    @property
    def nbytes(self) -> int:
        columns = [*self._scores.values(), *self._steps.values(), self.visits]
        columns += [] if self._dropped is None else [self._dropped]
        columns += [] if self._decisions is None else self._decisions.values()
        return sum(column.nbytes for column in columns)

    def rows(self, ids: Iterable[int] | np.ndarray) -> np.ndarray:
        """Row of each id; for a stream, new ids get the next free rows."""
        ids = np.asarray(ids, dtype=np.int64)
        if self._rows is None:
            if ids.size and (ids.min() < 0 or ids.max() >= len(self.visits)):
                raise IndexError(f"Example id {ids.min()}..{ids.max()} outside a dataset of {len(self.visits)} rows.")
            return ids
        rows = np.fromiter((self._rows.setdefault(i, len(self._rows)) for i in ids.tolist()), np.int64, len(ids))
        if len(self._rows) > len(self.visits):
            self._grow(max(len(self._rows), 2 * len(self.visits), GROWTH))
        return rows

    def _grow(self, capacity: int) -> None:
        def extended(column: np.ndarray, fill: float) -> np.ndarray:
            grown = np.full(capacity, fill, dtype=column.dtype)
            grown[: len(column)] = column
            return grown

        self.visits = extended(self.visits, 0)
        self._scores = {name: extended(column, np.nan) for name, column in self._scores.items()}
        self._steps = {name: extended(column, -1) for name, column in self._steps.items()}
        if self._dropped is not None:
            self._dropped = extended(self._dropped, 0)
        if self._decisions is not None:
            self._decisions = {name: extended(column, BLANK[name]) for name, column in self._decisions.items()}

    def add(self, name: str) -> None:
        """Makes an empty column `name` if there is none."""
        if name not in self._scores:
            self._scores[name] = np.full(len(self.visits), np.nan, dtype=np.float32)
            self._steps[name] = np.full(len(self.visits), -1, dtype=np.int32)

    def write(self, name: str, ids: Iterable[int] | np.ndarray | None, values: Any, step: int) -> None:
        """Writes `values` `(len(ids),)` under `name`, stamped with `step`; `ids=None` means all examples in order."""
        values = np.asarray(values, dtype=np.float32)
        self.add(name)
        if ids is None:
            if values.shape != (len(self),):
                raise ValueError(f"{name!r}: {values.shape} values for a ledger of {len(self)} examples.")
            self._scores[name][: len(self)] = values
            self._steps[name][: len(self)] = step
            return
        rows = self.rows(ids)
        self._scores[name][rows] = values
        self._steps[name][rows] = step

    def visit(self, ids: np.ndarray) -> None:
        """Counts one visit per id, repeated ids as often as they appear."""
        rows = self.rows(ids)
        unique, counts = np.unique(rows, return_counts=True)
        # One byte per example carries most runs; the column widens when a count would not fit.
        highest = int(self.visits[unique].max(initial=0)) + int(counts.max(initial=0))
        if highest > np.iinfo(self.visits.dtype).max:
            self.visits = self.visits.astype(np.uint16 if highest <= np.iinfo(np.uint16).max else np.uint32)
        self.visits[unique] += counts.astype(self.visits.dtype)

    def steps(self, name: str) -> np.ndarray:
        """Step at which each entry of `name` was written, `(N,)` int32; -1 = never."""
        return self._steps[name][: len(self)]

    def last_step(self) -> np.ndarray:
        """Latest step at which anything was written of each example, `(N,)` int32; -1 = never."""
        last = np.full(len(self), -1, dtype=np.int32)
        for name in self._steps:
            np.maximum(last, self.steps(name), out=last)
        return last

    def drop(self, mask: np.ndarray, reason: str) -> None:
        """Records that the examples of the bool `mask` `(N,)` are dropped for `reason`, and no others."""
        if self._dropped is None:
            self._dropped = np.zeros(len(self.visits), dtype=np.uint8)
        code = self._code(reason)
        dropped = self._dropped[: len(self)]
        dropped[dropped == code] = 0
        dropped[mask] = code

    def _code(self, reason: str) -> int:
        if reason not in self.reasons:
            self.reasons.append(reason)
        return self.reasons.index(reason)

    def decide(
        self,
        name: str,
        ids: np.ndarray | None,
        values: np.ndarray,
        step: int,
        rule: str = "",
        picks: bool = False,
    ) -> None:
        """
        Records the scores by which a method has just decided, of the examples it kept as of those it did not.

        Args:
            name (`str`):
                The method.
            ids (`np.ndarray`, *optional*):
                The examples; `None` means all of them in order.
            values (`np.ndarray` of shape `(len(ids),)`):
                Their scores; NaN for one that was decided on without a score.
            step (`int`):
                The optimizer step after which it decided.
            rule (`str`, *optional*):
                What it did about the scores, in words.
            picks (`bool`, *optional*, defaults to `False`):
                Whether the examples were candidates for one batch: what is not picked is not dropped.
        """
        # Rows of a stream come into being here.
        rows = np.arange(len(self)) if ids is None else self.rows(ids)
        if self._decisions is None:
            size = len(self.visits)
            self._decisions = {key: np.full(size, fill, dtype=np.asarray(fill).dtype) for key, fill in BLANK.items()}
        self._decisions["score"][rows] = values
        self._decisions["step"][rows] = step
        self._decisions["decider"][rows] = self._code(name)
        if rule:
            self.rules[name] = rule
        if picks and name not in self.pickers:
            self.pickers.append(name)

    def decisions(self) -> dict[str, np.ndarray]:
        """
        The last decision on each example: its `score`, `(N,)` float32, NaN where no score decided; the `step`, int32,
        -1 = never; and the `decider`, an object array of the names of methods, empty where there was none.
        """
        found = self._decisions
        if found is None:
            found = {key: np.full(len(self), fill) for key, fill in BLANK.items()}
        found = {key: column[: len(self)] for key, column in found.items()}
        return {**found, "decider": np.asarray(self.reasons, dtype=object)[found["decider"]]}

    @property
    def dropped(self) -> np.ndarray:
        """Whether each example is dropped now, `(N,)` bool."""
        return np.zeros(len(self), dtype=bool) if self._dropped is None else self._dropped[: len(self)] > 0

    def to_dataset(self, ids: np.ndarray | None = None) -> Dataset:
        """The ledger as a dataset; for its columns and `ids` see [`to_table`]."""
        return Dataset(InMemoryTable(self.to_table(ids)))

    def to_table(self, ids: np.ndarray | None = None) -> pa.Table:
        """
        The ledger as a table: `id`, one column per score, `visits`, `last_step`, `dropped_by` (empty = kept), and of
        the last decision that a score made `decided_by`, `decision_score`, `decision_step` (-1 = none), and `reason`,
        in words for each example that was dropped, or was a candidate and never picked.

        Args:
            ids (`np.ndarray` of shape `(N,)`, *optional*):
                Ids to show instead of the row numbers, such as positions in the user's own dataset.
        """
        rows = np.arange(len(self)) if self._rows is None else np.fromiter(self._rows, np.int64, len(self))
        codes = np.zeros(len(self), dtype=np.uint8) if self._dropped is None else self._dropped[: len(self)]
        table: dict[str, Any] = {"id": rows if ids is None else ids}
        table.update({name: self[name] for name in self.names})
        table["visits"] = self.visits[: len(self)].astype(np.int64)
        table["last_step"] = self.last_step()
        names, decisions = np.asarray(self.reasons, dtype=object), self.decisions()
        table["dropped_by"] = pa.array(names[codes], pa.string())
        table["decided_by"] = pa.array(decisions["decider"], pa.string())
        table["decision_score"], table["decision_step"] = decisions["score"], decisions["step"]
        # A candidate that was never picked has not been dropped: another time it may be.
        passed = (codes == 0) & (self.visits[: len(self)] == 0) & np.isin(decisions["decider"], self.pickers)
        by = np.where(passed, decisions["decider"], names[codes])
        words = {name: f"{name}: {self.rules.get(name, 'left out')}" if name else "" for name in self.reasons}
        table["reason"] = pa.array([words[name] for name in by], pa.string())
        return pa.table(table)

    def state_dict(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Arrays and JSON values that `load_state_dict` takes back."""
        arrays = {"visits": self.visits[: len(self)]}
        for name in self.names:
            arrays[f"score:{name}"], arrays[f"step:{name}"] = self[name], self.steps(name)
        if self._dropped is not None:
            arrays["dropped"] = self._dropped[: len(self)]
        if self._decisions is not None:
            arrays.update({f"decision:{name}": column[: len(self)] for name, column in self._decisions.items()})
        if self._rows is not None:
            arrays["ids"] = np.fromiter(self._rows, np.int64, len(self))
        values = {"names": self.names, "reasons": self.reasons, "rules": self.rules, "pickers": self.pickers}
        return arrays, {**values, "size": len(self)}

    def load_state_dict(self, arrays: dict[str, np.ndarray], values: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave; the ledger must be of the same size (a stream's may be empty)."""
        if self._rows is None and values["size"] != len(self):
            raise ValueError(f"The saved ledger is of {values['size']} examples, this dataset has {len(self)}.")
        if "ids" in arrays:
            self._rows = {int(i): row for row, i in enumerate(arrays["ids"].tolist())}
        self.visits = arrays["visits"].copy()
        self._scores = {name: arrays[f"score:{name}"].copy() for name in values["names"]}
        self._steps = {name: arrays[f"step:{name}"].copy() for name in values["names"]}
        self.reasons = list(values["reasons"])
        self.rules, self.pickers = dict(values["rules"]), list(values["pickers"])
        self._dropped = arrays["dropped"].copy() if "dropped" in arrays else None
        decided = "decision:score" in arrays
        self._decisions = {name: arrays[f"decision:{name}"].copy() for name in BLANK} if decided else None
