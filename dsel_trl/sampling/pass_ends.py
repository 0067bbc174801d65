"""Where the passes over what is kept end, in examples handed out since the run began."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike


class PassEnds:
    """
    How many examples a run has handed out when each of its passes is through.

    Args:
        ends (array-like of int, *optional*):
            What `array` gave for a checkpoint.
    """

    def __init__(self, ends: ArrayLike = ()) -> None:
        self._ends: list[int] = np.asarray(ends, dtype=np.int64).tolist()

    @property
    def array(self) -> np.ndarray:
        return np.array(self._ends, dtype=np.int64)

    @property
    def begun(self) -> int:
        """How many passes have begun."""
        return len(self._ends)

    def planned(self, size: int, waiting: int, anew: bool) -> None:
        """
        A plan was made.

        Args:
            size (`int`):
                Examples of the plan.
            waiting (`int`):
                Examples of the plan before it that were not handed out, and now will not be.
            anew (`bool`):
                Whether it begins a pass.
        """
        before = self._ends[-1] - waiting if self._ends else 0
        self._ends = [*(self._ends if anew else self._ends[:-1]), before + size]

    def after(self, passes: float) -> float:
        """Examples handed out when `passes` of them are through; infinite where the last of these has not begun."""
        whole, part = int(passes), passes % 1
        if self.begun < whole + bool(part):
            return float("inf")
        before = self._ends[whole - 1] if whole else 0
        return before + float(np.ceil(part * (self._ends[whole] - before))) if part else before


def joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    """The ids of several arrays in one, `(n,)` int64."""
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
