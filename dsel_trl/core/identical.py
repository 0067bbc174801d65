"""Leaving out pairs that teach nothing, for the parameter `identical` of a selection."""

from dataclasses import dataclass

import numpy as np

from ..data.rows import Rows
from .method import Method, Run

# What can be done about them.
IDENTICAL = ("warn", "drop")


def identical_notice(rows: Rows) -> str:
    """What is said of pairs whose two sides are equal."""
    cut = "" if rows.max_length is None else f" after truncation to max_length={rows.max_length}"
    return (
        f"{int(rows.identical.sum())} of {len(rows)} pairs have two sides that are equal{cut}: no preference can be "
        "learned from them. Set identical='drop' to leave them out, or a larger max_length."
    )


@dataclass
class DropIdentical(Method):
    """Leaves out pairs whose two sides are equal after truncation; what is left is served in random order."""

    name = "identical"
    trainers = ("dpo", "reward")

    def select(self, run: Run) -> np.ndarray:
        run.decide((~run.rows.identical).astype(np.float32), "0: both sides are equal")
        return ~run.rows.identical

    def epoch_size(self, run: Run) -> int:
        return run.size - int(run.rows.identical.sum())
