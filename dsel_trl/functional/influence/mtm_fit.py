"""
Whether a selection by Shapley values can be trusted: is the game a monotone function of a sum
(hf.co/papers/2405.03875)?

In such a game, `v(S) = f(w_0 + sum of w_i over S)` with `f` not decreasing, the players of the highest Shapley values
are the best set of every size. In others they may be no better than a draw: two duplicates of one useful example share
its value, and both are kept.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
MOST_RESIDUAL, LEAST_CORRELATION = 0.2, 0.5
# Sums that differ by rounding are one.
DECIMALS = 12


def linear_weights(members: ArrayLike, worth: ArrayLike, ridge: float = 1e-6) -> Floats:
    """
    Weights of the players by least squares of the sets' worth on 1 and membership.

    Args:
        members (`array` of shape `(m, n)`, bool):
            Who is in each set.
        worth (`array` of shape `(m,)`):
            What each set is worth.
        ridge (`float`, *optional*, defaults to `1e-6`):
            Penalty on squared weights; 0 takes the smallest of the best weights.

    Returns:
        `np.ndarray` of shape `(n,)`, float64: without the constant.
    """
    design, values = np.asarray(members, dtype=np.float64), np.asarray(worth, dtype=np.float64)
    centred, target = design - design.mean(axis=0), values - values.mean()
    if ridge:
        gram = centred.T @ centred + ridge * np.eye(design.shape[1])
        return np.asarray(np.linalg.solve(gram, centred.T @ target), dtype=np.float64)
    return np.asarray(np.linalg.lstsq(centred, target, rcond=None)[0], dtype=np.float64)


@dataclass(frozen=True)
class Isotonic:
    """A non-decreasing function by its corners, straight between them and flat outside: `(k,)` each."""

    at: Floats
    values: Floats

    def __call__(self, sums: ArrayLike) -> Floats:
        """Its values at `sums`, float64 of the same shape."""
        return np.interp(np.round(np.asarray(sums, dtype=np.float64), DECIMALS), self.at, self.values)


def isotonic(sums: ArrayLike, worth: ArrayLike) -> Isotonic:
    """
    The non-decreasing function of `sums` nearest to `worth` in squares, `(m,)` each; equal sums are pooled first.
    """
    places, inverse, counts = np.unique(
        np.round(np.asarray(sums, dtype=np.float64), DECIMALS), return_inverse=True, return_counts=True
    )
    means = np.bincount(inverse, weights=np.asarray(worth, dtype=np.float64)) / counts
    levels: list[list[float]] = []
    for mean, count in zip(means.tolist(), counts.tolist(), strict=True):
        levels.append([mean, count, 1])
        # Neighbours in the wrong order become one level.
        while len(levels) > 1 and levels[-2][0] >= levels[-1][0]:
            value, weight, width = levels.pop()
            last = levels[-1]
            last[0] = (last[0] * last[1] + value * weight) / (last[1] + weight)
            last[1] += weight
            last[2] += width
    values = np.repeat([level[0] for level in levels], [int(level[2]) for level in levels])
    return Isotonic(places.astype(np.float64), values)


def residual(worth: ArrayLike, fitted: ArrayLike) -> float:
    """Share of the variance of `worth` that `fitted` leaves, both `(m,)`; 0 where nothing varies."""
    values = np.asarray(worth, dtype=np.float64)
    total = float(((values - values.mean()) ** 2).sum())
    return float(((values - np.asarray(fitted)) ** 2).sum()) / total if total > 0 else 0.0


def spearman(one: ArrayLike, other: ArrayLike) -> float:
    """Rank correlation of two rows of numbers, with average ranks for equal ones; NaN where one is constant."""
    ranks = []
    for values in (one, other):
        _, inverse, counts = np.unique(
            np.round(np.asarray(values, dtype=np.float64), DECIMALS), return_inverse=True, return_counts=True
        )
        rank = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
        ranks.append(rank - rank.mean())
    scale = np.sqrt((ranks[0] ** 2).sum() * (ranks[1] ** 2).sum())
    return float((ranks[0] * ranks[1]).sum() / scale) if scale > 0 else float("nan")


def spearman_by_size(members: ArrayLike, weights: ArrayLike, worth: ArrayLike) -> dict[int, float]:
    """
    Rank correlation between the sums of `weights` `(n,)` over the sets and their worth `(m,)`, within each size of set
    that occurs.
    """
    inside, values = np.asarray(members, dtype=bool), np.asarray(worth, dtype=np.float64)
    sums, sizes = inside @ np.asarray(weights, dtype=np.float64), inside.sum(axis=1)
    return {int(size): spearman(sums[sizes == size], values[sizes == size]) for size in np.unique(sizes)}


@dataclass(frozen=True)
class ModularFit:
    """
    A monotone function of a sum, fitted to a game.

    Attributes:
        weights (`np.ndarray` of shape `(n,)`): `w` of the players.
        function ([`Isotonic`]): `f` of their sum.
        residual (`float`): share of the variance that it leaves, of the sets that were held out.
    """

    weights: Floats
    function: Isotonic
    residual: float


def modular_fit(
    members: ArrayLike, worth: ArrayLike, held_out: ArrayLike, *, ridge: float = 1e-6, iterations: int = 50
) -> ModularFit:
    """
    Fits a monotone function of a sum: least squares, isotonic regression, and both in turns (Isotron).

    Args:
        members (`array` of shape `(m, n)`, bool):
            Who is in each set.
        worth (`array` of shape `(m,)`):
            What each set is worth.
        held_out (`array` of shape `(m,)`, bool):
            Sets that the fit is judged by, and not made from. If none is, it is judged by those it is made from.
        ridge (`float`, *optional*, defaults to `1e-6`):
            As in [`linear_weights`].
        iterations (`int`, *optional*, defaults to `50`):
            Most turns of Isotron; the turn of the smallest residual is kept. 0: none.

    Returns:
        [`ModularFit`]
    """
    inside, values = np.asarray(members, dtype=np.float64), np.asarray(worth, dtype=np.float64)
    held = np.asarray(held_out, dtype=bool)
    judged = held if held.any() else ~held
    made, target = inside[~held], values[~held]

    def judge(weights: Floats) -> ModularFit:
        function = isotonic(made @ weights, target)
        return ModularFit(weights, function, residual(values[judged], function(inside[judged] @ weights)))

    best = now = judge(linear_weights(made, target, ridge))
    for _ in range(iterations):
        error = target - now.function(made @ now.weights)
        if not error.any():
            break
        now = judge(now.weights + made.T @ error / len(made))
        if now.residual < best.residual:
            best = now
    return best


def trusted(left: float, correlations: ArrayLike) -> bool:
    """Whether a held-out residual and the rank correlations at the size wanted allow a selection by Shapley values."""
    known = np.asarray(correlations, dtype=np.float64)
    return bool(left <= MOST_RESIDUAL and np.all(known >= LEAST_CORRELATION))
