"""Cosine relevance: how near each example lies to a target."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..kmeans import unit_rows

Floats = NDArray[np.float64]

OVER = ("mean", "max")


def cosine_relevance(vectors: ArrayLike, target: ArrayLike, over: str = "mean", block: int = 4096) -> Floats:
    """
    Cosine of each example's embedding to those of a target, over all of them, `(N,)` in [-1, 1].

    Args:
        vectors (`array` of shape `(N, d)`):
            Embeddings of the examples. The score of one that is not finite is NaN, that of a zero vector 0.
        target (`array` of shape `(M, d)`):
            Embeddings of the target; those that are not finite are left out.
        over (`str`, *optional*, defaults to `"mean"`):
            `"mean"` over the target, or `"max"`: of the nearest one (hf.co/papers/2402.04333, the baseline RDS).
        block (`int`, *optional*, defaults to `4096`):
            Examples whose cosines to all of the target are in memory at once.

    Raises:
        `ValueError`: for an unknown `over`, or if nothing in the target is finite.
    """
    if over not in OVER:
        raise ValueError(f"over={over!r} is none of {list(OVER)}.")
    rows, goal = np.asarray(vectors), np.asarray(target)
    goal = goal[np.isfinite(goal).all(axis=1)]
    if not len(goal):
        raise ValueError("No embedding of the target is finite.")
    wanted = unit_rows(goal).astype(np.float64)
    known = np.isfinite(rows).all(axis=1)
    found = np.full(len(rows), np.nan)
    # The mean of products is the product with the mean.
    against = wanted.mean(axis=0, keepdims=True) if over == "mean" else wanted
    for start in range(0, len(rows), block):
        places = start + np.flatnonzero(known[start : start + block])
        found[places] = (unit_rows(rows[places]).astype(np.float64) @ against.T).max(axis=1)
    return found
