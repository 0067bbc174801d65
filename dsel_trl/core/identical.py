"""Leaving out pairs that teach nothing, for the parameter `identical` of a selection."""

from dataclasses import dataclass

import numpy as np

from .method import Method, Run

# What can be done about them.
IDENTICAL = ("warn", "drop")


@dataclass
class DropIdentical(Method):
    """Leaves out pairs whose two sides are equal after truncation; what is left is served in random order."""

    name = "identical"
    trainers = ("dpo", "reward")

    def select(self, run: Run) -> np.ndarray:
        return ~run.rows.identical

    def epoch_size(self, run: Run) -> int:
        return run.size - int(run.rows.identical.sum())
