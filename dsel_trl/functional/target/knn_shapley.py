"""KNN-Shapley: what each example is worth to a nearest-neighbour rule on a target (hf.co/papers/1908.08619)."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from ..sinkhorn import cost_matrix

Floats = NDArray[np.float64]


def knn_shapley_values(distances: ArrayLike, matches: ArrayLike, neighbours: int) -> Floats:
    """
    Shapley values of the game "how much do the nearest of a coalition match one target example", `(N,)`.

    `v(S)` is the sum of the matches of the `min(K, |S|)` nearest of `S`, divided by `K` (hf.co/papers/1908.08619,
    Theorem 1; its last value is for `N >= K`, here for any `N`).

    Args:
        distances (`array` of shape `(N,)`):
            Distance of each example to the target example; of equal ones the lower id is nearer.
        matches (`array` of shape `(N,)`):
            1 where the example says the same as the target, 0 where it does not, or anything between.
        neighbours (`int`):
            `K`.

    Raises:
        `ValueError`: if `neighbours` is not positive.
    """
    if neighbours < 1:
        raise ValueError(f"neighbours={neighbours!r} is not positive.")
    order = np.argsort(np.asarray(distances), kind="stable")
    nearest = np.asarray(matches, dtype=np.float64)[order]
    count = len(nearest)
    values = np.zeros(count)
    if not count:
        return values
    places = np.arange(1, count)
    steps = (nearest[:-1] - nearest[1:]) / neighbours * np.minimum(neighbours, places) / places
    last = nearest[-1] * min(neighbours, count) / (count * neighbours)
    values[order] = last + np.append(np.cumsum(steps[::-1])[::-1], 0.0)
    return values


def knn_shapley(
    vectors: ArrayLike,
    target: ArrayLike,
    match: Callable[[int], ArrayLike],
    neighbours: int,
    *,
    metric: str = "cosine",
    block: int = 16,
) -> Floats:
    """
    Mean of [`knn_shapley_values`] over the examples of a target, `(N,)`.

    Args:
        vectors (`array` of shape `(N, d)`):
            Embeddings of the examples. Where one is not finite its value is NaN, and it is nobody's neighbour.
        target (`array` of shape `(M, d)`):
            Embeddings of the target; those that are not finite are left out.
        match (`Callable[[int], array]`):
            How well every example matches a target example, `(N,)`, by the position of that one.
        neighbours (`int`):
            `K`.
        metric (`str`, *optional*, defaults to `"cosine"`):
            See [`~dsel_trl.functional.sinkhorn.cost_matrix`].
        block (`int`, *optional*, defaults to `16`):
            Target examples whose distances are in memory at once.

    Time: `O(M N log N)`; memory: `8 N block` bytes.

    Raises:
        `ValueError`: if nothing in either set is finite.
    """
    rows, goal = np.asarray(vectors), np.asarray(target)
    known, usable = np.isfinite(rows).all(axis=1), np.flatnonzero(np.isfinite(goal).all(axis=1))
    if not known.any() or not len(usable):
        raise ValueError(f"No embedding of the {'target' if known.any() else 'examples'} is finite.")
    kept = torch.as_tensor(rows if known.all() else rows[known])
    total = np.zeros(int(known.sum()))
    for start in range(0, len(usable), block):
        part = usable[start : start + block]
        distances = cost_matrix(torch.as_tensor(goal[part], dtype=kept.dtype), kept, metric).numpy()
        for place, row in zip(part, distances, strict=True):
            total += knn_shapley_values(row, np.asarray(match(int(place)))[known], neighbours)
    values = np.full(len(rows), np.nan)
    values[known] = total / len(usable)
    return values
