"""
Data Shapley: what every player of a game adds, on average over the orders in which they can join.

The players are examples or groups of them, the worth of a set is what a model trained on it can do
(proceedings.mlr.press/v97/ghorbani19c.html).
"""

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def exact_shapley(worth: ArrayLike) -> Floats:
    """
    Shapley values of a small game by their definition.

    Args:
        worth (`array` of shape `(2**n,)`):
            Worth of every set of players; the set is the bits of its position: 0 is the empty set, 5 players 0 and 2.

    Returns:
        `np.ndarray` of shape `(n,)`, float64. They sum to `worth[-1] - worth[0]`.

    Raises:
        `ValueError`: if there are not `2**n` finite values for some `n`.

    Example:

    ```python
    >>> from dsel_trl.functional.influence.data_shapley import exact_shapley

    >>> exact_shapley([0.0, 1.0, 2.0, 5.0])
    array([2., 3.])
    ```
    """
    values = np.asarray(worth, dtype=np.float64)
    players = len(values).bit_length() - 1
    if values.ndim != 1 or players < 1 or len(values) != 2**players or not np.isfinite(values).all():
        raise ValueError(
            f"worth of shape {values.shape} is not one finite value for each of the 2**n sets of n players."
        )
    sizes = subsets(players).sum(axis=1)
    # |S|! (n - |S| - 1)! / n!, by the size of S.
    share = np.array([1 / (players * math.comb(players - 1, size)) for size in range(players)])
    found = np.empty(players)
    for player in range(players):
        # Pairs of sets that differ in this player alone.
        pairs = values.reshape(-1, 2, 2**player)
        without = sizes.reshape(-1, 2, 2**player)[:, 0]
        found[player] = (share[without] * (pairs[:, 1] - pairs[:, 0])).sum()
    return found


def subsets(players: int) -> NDArray[np.bool_]:
    """All sets of `players`, `(2**n, n)` bool, in the order of [`exact_shapley`]."""
    return np.asarray((np.arange(2**players)[:, None] >> np.arange(players)) % 2 == 1, dtype=np.bool_)


def marginals(
    order: ArrayLike,
    growing: Iterable[float],
    empty: float,
    full: float,
    *,
    tolerance: float | None = None,
    patience: int = 5,
) -> tuple[Floats, int]:
    """
    What each player adds when they join in one order, truncated where nothing is left to add.

    Args:
        order (`array` of int, shape `(n,)`):
            The players as they join.
        growing (`Iterable[float]`):
            Worth of the first player, of the first two, and so on; no more of them are asked for than are needed.
        empty, full (`float`):
            Worth of nobody and of all.
        tolerance (`float`, *optional*):
            A set is as good as all if its worth is within this share of `full`. None: no truncation. A `full` of 0
            leaves no room: then only a set worth exactly 0 counts.
        patience (`int`, *optional*, defaults to `5`):
            So many sets in a row that are as good as all end the walk: the players left add nothing.

    Returns:
        `tuple[np.ndarray, int]`: what each player adds, `(n,)` float64 by player; how many sets were valued. All are
        NaN where a worth is not finite: an order that failed is not averaged.
    """
    players = np.asarray(order, dtype=np.int64)
    found = np.zeros(len(players))
    before, hits, valued = float(empty), 0, 0
    for player, worth in zip(players.tolist(), growing, strict=False):
        valued += 1
        if not math.isfinite(worth):
            return np.full(len(players), np.nan), valued
        found[player] = worth - before
        before = worth
        if tolerance is not None:
            hits = hits + 1 if abs(worth - full) <= tolerance * abs(full) else 0
            if hits >= patience:
                break
    return found, valued


def mean_marginals(rows: ArrayLike) -> Floats:
    """Estimated values: the mean over orders `(T, n)`, without those that failed; NaN if all did."""
    values = np.asarray(rows, dtype=np.float64)
    good = np.isfinite(values).all(axis=1)
    return values[good].mean(axis=0) if good.any() else np.full(values.shape[1], np.nan)


def drift(rows: ArrayLike, window: int = 100) -> float:
    """
    How far the estimates have moved over the last orders, relative to where they are now.

    Args:
        rows (`array` of shape `(T, n)`):
            What each player added in each order.
        window (`int`, *optional*, defaults to `100`):
            Orders to look back.

    Returns:
        `float`: the largest, over the last `window` orders, of the players' mean relative distance from the last
        estimate; infinite before there are so many. Below 0.05 it is time to stop.
    """
    values = np.asarray(rows, dtype=np.float64)
    values = values[np.isfinite(values).all(axis=1)]
    count = len(values)
    if count < window:
        return math.inf
    sums = values[: count - window].sum(axis=0) + np.cumsum(values[count - window :], axis=0)
    means = sums / np.arange(count - window + 1, count + 1)[:, None]
    return float((np.abs(means - means[-1]) / (np.abs(means[-1]) + 1e-12)).mean(axis=1).max())
