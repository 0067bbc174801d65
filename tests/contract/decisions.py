"""What a method decided in a run, written down at the moment it did."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass
class Plan:
    """
    One plan: `ids` in their order, the `kept` set that they are of, and the ids `served` before it in the epoch.

    `known` and `unknown` say which examples had been measured with and without a result, `(N,)` bool each.
    """

    epoch: int
    served: np.ndarray
    ids: np.ndarray
    kept: np.ndarray
    known: np.ndarray
    unknown: np.ndarray


@dataclass
class Pick:
    """One choice of `positions` among `candidates`."""

    candidates: Any
    positions: np.ndarray

    @property
    def ids(self) -> np.ndarray:
        return self.candidates.ids.cpu().numpy()


def all_known(size: int) -> tuple[np.ndarray, np.ndarray]:
    return np.ones(size, dtype=bool), np.zeros(size, dtype=bool)


class Decisions:
    """
    Writes down the plans and the picks of a run.

    Args:
        selection ([`SelectionCallback`]):
            The callback of a trainer that has not trained yet.
        known (`Callable[[int], tuple[np.ndarray, np.ndarray]]`, *optional*):
            Which of `size` examples are known now, and which are measured and yet unknown; all are known by default.
    """

    def __init__(self, selection: Any, known: Callable[[int], tuple[np.ndarray, np.ndarray]] = all_known) -> None:
        self.plans: list[Plan] = []
        self.picks: list[Pick] = []
        plan = selection.methods.plan

        def planned(run: Any) -> tuple[np.ndarray, np.ndarray]:
            ids, kept = plan(run)
            self.plans.append(Plan(run.epoch, run.served.copy(), ids.copy(), kept.copy(), *known(run.size)))
            return ids, kept

        selection.methods.plan = planned
        for method in selection.methods.using("pick"):
            self._watch(method)

    def _watch(self, method: Any) -> None:
        pick = method.pick

        def picked(run: Any, candidates: Any) -> Any:
            positions = pick(run, candidates)
            self.picks.append(Pick(candidates, positions.cpu().numpy()))
            return positions

        method.pick = picked
