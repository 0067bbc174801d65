"""A game whose worth is known in a moment: how well a linear model, trained on a set, foretells what is held out."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


class ProbeGame:
    """
    Players are rows, or groups of rows; a set is worth the held-out squared error that ridge regression on its rows
    takes off, compared with a model that says 0. Nobody is worth 0.

    Args:
        inputs (`array` of shape `(N, d)`):
            What the model sees of each row.
        targets (`array` of shape `(N, c)`):
            What it foretells.
        held_inputs, held_targets (`array` of shapes `(M, d)` and `(M, c)`):
            Rows that are held out.
        players (`array` of int, shape `(N,)`):
            Player of each row, from 0 without gaps.
        ridge (`float`, *optional*, defaults to `10.0`):
            Penalty on squared weights, in rows: with inputs of unit scale, as strong as so many of them.

    Raises:
        `ValueError`: if something is not finite, or `ridge` is not positive.

    Time of one worth: `d**3 / 3` and `d**2` for each row added. Memory: that of the inputs, in float64.
    """

    def __init__(
        self,
        inputs: ArrayLike,
        targets: ArrayLike,
        held_inputs: ArrayLike,
        held_targets: ArrayLike,
        players: ArrayLike,
        ridge: float = 10.0,
    ) -> None:
        rows, goals, held, truth = (
            np.asarray(part, dtype=np.float64) for part in (inputs, targets, held_inputs, held_targets)
        )
        if not all(np.isfinite(part).all() for part in (rows, goals, held, truth)):
            raise ValueError("Features that are not finite cannot be learned from.")
        if not ridge > 0:
            raise ValueError(f"ridge={ridge!r} must be above 0.")
        codes = np.asarray(players, dtype=np.int64)
        self.ridge, self.sizes = ridge, np.bincount(codes)
        order = np.argsort(codes, kind="stable")
        ends = np.cumsum(self.sizes)
        self._rows = [order[end - size : end] for end, size in zip(ends, self.sizes, strict=True)]
        self._inputs, self._targets, self._codes = rows, goals, codes
        # The held-out error is a quadratic form of the weights.
        self._gram, self._cross = held.T @ held / len(held), held.T @ truth / len(held)

    def __len__(self) -> int:
        return len(self.sizes)

    def worth(self, members: ArrayLike) -> float:
        """What the players of a mask `(n,)` bool are worth together."""
        inside = np.asarray(members, dtype=bool)[self._codes]
        rows = self._inputs[inside]
        return self._of(rows.T @ rows, rows.T @ self._targets[inside])

    def growing(self, order: ArrayLike) -> Iterator[float]:
        """What the first player of `order` `(n,)` is worth, the first two, and so on."""
        gram, cross = np.zeros_like(self._gram), np.zeros_like(self._cross)
        for player in np.asarray(order).tolist():
            rows = self._inputs[self._rows[player]]
            gram += rows.T @ rows
            cross += rows.T @ self._targets[self._rows[player]]
            yield self._of(gram, cross)

    def _of(self, gram: Floats, cross: Floats) -> float:
        penalised = gram.copy()
        penalised.flat[:: len(gram) + 1] += self.ridge
        weights = np.linalg.solve(penalised, cross)
        return float((weights * (2 * self._cross - self._gram @ weights)).sum())
