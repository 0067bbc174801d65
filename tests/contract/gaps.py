"""A run in which every fourth example cannot be measured."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from datasets import Dataset
from torch import Tensor

from dsel_trl import Method
from dsel_trl.core.ledger import Ledger

EVERY = 4
# What the run itself writes down of each trained example.
MEASURED_BY_THE_RUN = ("loss", "implicit_margin")
COLUMNS, PASSES, HELPERS, CANDIDATES = "columns", "passes", "helpers", "candidates"


def missing(ids: Any) -> Any:
    """Which of `ids` cannot be measured."""
    return ids % EVERY == 0


def without_numbers(dataset: Dataset) -> Dataset:
    """The dataset with the numeric columns of every fourth row empty."""
    rows = dataset.to_list()
    for row in rows[::EVERY]:
        row.update({key: None for key, value in row.items() if isinstance(value, float)})
    return Dataset.from_list(rows)


class LedgerWithGaps(Ledger):
    """A ledger in which what the run measures of every fourth example is NaN; it says when it is read."""

    gaps: "Gaps"

    def __getitem__(self, name: str) -> np.ndarray:
        self.gaps.looked.add(name)
        return super().__getitem__(name)

    def write(self, name: str, ids: Any, values: Any, step: int) -> None:
        if name in MEASURED_BY_THE_RUN:
            values = self.gaps.hide(name, values, np.arange(len(self)) if ids is None else np.asarray(ids))
        super().write(name, ids, values, step)


class Gaps(Method):
    """
    Hides from another method what can be measured of every fourth example: its scores, numeric columns, losses, and
    what helper models and passes say.

    It goes before that method in the list of methods and changes nothing else. `looked` names what the method has
    looked at, `used` says whether a part of that was hidden.
    """

    name = "gaps"
    trainers = ("dpo", "sft", "kto", "reward")
    packed_rows = True

    def __init__(self, method: Method) -> None:
        self.method = method
        self.looked: set[str] = set()
        self.used = self._weighing = False
        self._measured: dict[str, set[int]] = {}
        if "score" in method.hooks:
            self._wrap("score", self._score)
        if "weigh" in method.hooks:
            self._wrap("weigh", self._weigh)
        if "pick" in method.hooks and method.scores_candidates:
            self._wrap("pick", self._pick)
        if hasattr(method, "measure"):
            self._wrap("measure", self._measure)

    def _wrap(self, name: str, around: Callable[..., Any]) -> None:
        inner = getattr(self.method, name)
        setattr(self.method, name, lambda *args: around(inner, *args))

    def known(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Of `size` examples, which have been measured with a result, and which without: by what was looked at."""
        ids = np.arange(size)
        measured = np.isin(ids, [i for name in self.looked for i in self._measured.get(name, ())])
        return measured & ~missing(ids), measured & missing(ids)

    def hide(self, name: str, values: Any, ids: np.ndarray) -> np.ndarray:
        """`values` `(..., len(ids))` with gaps; an infinite one stays, for it is a decision and no measurement."""
        self._measured.setdefault(name, set()).update(ids.tolist())
        values = np.array(values, dtype=np.float64)
        return np.where(missing(ids) & ~np.isinf(values), math.nan, values)

    def observe(self, run: Any, step: Any) -> None:
        # Not what is read when the run has ended, for its report.
        self.used = not self.looked.isdisjoint(self._measured)

    # ---- What can be measured ----

    def check(self, run: Any) -> None:
        run.ledger.__class__, run.ledger.gaps = LedgerWithGaps, self
        column, measure, train_helper = run.rows.column, run.passes.measure, run.train_helper

        def read_column(name: str) -> np.ndarray:
            self.looked.add(COLUMNS)
            return self.hide(COLUMNS, column(name), np.arange(run.size))

        def measured(function: Any, ids: Any = None, **how: Any) -> np.ndarray:
            values = measure(function, ids, **how)
            ids = np.arange(run.size) if ids is None else np.asarray(ids)
            # Vectors, and values of rows that are no examples, are not scores.
            if values.shape != ids.shape:
                return values
            self.looked.add(PASSES)
            return self.hide(PASSES, values, ids).astype(np.float32)

        def helped(train_ids: np.ndarray, score_ids: np.ndarray, *args: Any, **how: Any) -> np.ndarray:
            values = train_helper(train_ids, score_ids, *args, **how)
            if values.shape[-1] != len(score_ids):
                return values
            self.looked.add(HELPERS)
            return self.hide(HELPERS, values, score_ids).astype(np.float32)

        run.rows.column, run.passes.measure, run.train_helper = read_column, measured, helped

    def _measure(self, measure: Any, run: Any) -> dict[str, np.ndarray]:
        arrays, name = measure(run), self.method.name
        return {**arrays, name: self.hide(name, arrays[name], np.arange(run.size))}

    def _score(self, score: Any, batch: Any) -> Any:
        scores = score(batch)

        def gappy(name: str, values: Tensor) -> Tensor:
            self._measured.setdefault(name, set()).update(batch.ids.tolist())
            # Scores that only go to the ledger count when they are read there.
            if self._weighing:
                self.looked.add(name)
            return values.masked_fill(missing(batch.ids), math.nan)

        if isinstance(scores, dict):
            return {key: gappy(key, value) for key, value in scores.items()}
        return gappy(self.method.name, scores)

    def _weigh(self, weigh: Any, batch: Any) -> Any:
        self._weighing = True
        try:
            return weigh(batch)
        finally:
            self._weighing = False

    def _pick(self, pick: Any, run: Any, candidates: Any) -> Tensor:
        self.looked.add(CANDIDATES)
        self._measured.setdefault(CANDIDATES, set()).update(candidates.ids.tolist())
        logps = candidates.policy.log_probs
        gaps = missing(candidates.ids).repeat(len(logps) // len(candidates.ids))
        policy = dataclasses.replace(candidates.policy, log_probs=logps.masked_fill(gaps[:, None], math.nan))
        return pick(run, dataclasses.replace(candidates, policy=policy))
