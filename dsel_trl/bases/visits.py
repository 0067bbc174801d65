"""Scores that are the mean over an example's visits, within a window at the start of the training."""

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from ..core.method import Run, Step
from ..core.parameters import Reads, check_range, unless
from ..functional.running import add_to_means
from .scored import ByScore


@dataclass
class OverVisits(ByScore):
    """
    A live score that is averaged over an example's visits.

    A method writes the value of each visit under `<name>_last`; the mean is kept under its own name, and how many
    visits it is of under `<name>_visits`.
    """

    window: float = field(
        default=1.0, metadata={"help": "share of the training, from its start, whose visits count, in (0, 1]"}
    )

    state = "three columns: the mean, the last value and the visits that count (24 bytes per example)"
    reads: ClassVar[Reads] = {"window": (unless("action", "weight"),)}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("window", self.window, 0, 1, open_low=True)

    @property
    def last(self) -> str:
        """Column of the value of the last visit."""
        return f"{self.name}_last"

    def observe(self, run: Run, step: Step) -> None:
        if self.last not in step.values:
            return
        ledger, visits = run.ledger, f"{self.name}_visits"
        for name in (self.name, visits):
            ledger.add(name)
        ids, which = np.unique(step.ids, return_inverse=True)
        rows = ledger.rows(ids)
        counts = np.nan_to_num(ledger[visits][rows])
        means = add_to_means(ledger[self.name][rows], counts, which, step.values[self.last])
        ledger.write(self.name, ids, means, run.step)
        ledger.write(visits, ids, counts, run.step)
