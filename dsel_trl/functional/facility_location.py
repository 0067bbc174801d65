"""Facility location: few examples that stand near to all the others (Superfiltering.D, hf.co/papers/2402.00530)."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .kmeans import unit_rows

Floats = NDArray[np.float64]
Ids = NDArray[np.int64]

# Candidates in a tile of distances: with 256 examples it holds 8 MB.
TILE = 4096
# Gains that differ by less than this share of the largest are equal: it is far above the rounding of a sum.
TIE = 1e-9
# Squared distances between unit vectors below this are the rounding of 2 - 2.
COINCIDE = 1e-12


def facility_location(embeddings: ArrayLike, k: int, *, block_size: int = 256) -> Ids:
    """
    Greedy facility location: each pick is the example that brings most examples nearest to a picked one.

    Maximises the sum over all examples of their largest similarity to a picked one, where the similarity of two unit
    vectors is `1 - distance / 2`, in [0, 1]. An affine change of the similarity changes no pick but for ties, so these
    are the picks of every kernel that falls linearly with the distance; the published script's
    `exp(-distance / d)` does so to within `1 / d`. The greedy choice reaches at least `1 - 1/e` of the optimum.

    Gains are exact: a pick changes those of the others only through the examples that it covers better than before.

    Args:
        embeddings (`array` of shape `(N, d)`):
            One vector per example; rows are scaled to length 1 first. A zero row stands at a right angle to all.
        k (`int`):
            How many to pick; clamped to [1, N].
        block_size (`int`, *optional*, defaults to `256`):
            Examples whose distances are held at once; it does not change the result.

    Returns:
        `np.ndarray` of int64 of shape `(k,)`: ids in the order of the picks; ties go to the lower id.

    Raises:
        `ValueError`: if a vector is not finite or `block_size` is not positive.

    Time: all `N^2` distances once, and `N` for every time that an example becomes better covered, which happens to it
    about `log k` times. Memory: two copies of the vectors in float64 and one tile; never an `N x N` matrix.

    Example:

    ```python
    >>> from dsel_trl.functional.facility_location import facility_location

    >>> facility_location([[1.0, 0.0], [1.0, 0.1], [1.0, 0.2], [0.0, 1.0]], k=2).tolist()
    [1, 3]
    ```
    """
    if block_size < 1:
        raise ValueError(f"`block_size` must be at least 1, got {block_size}")
    rows = unit_rows(np.asarray(unit_rows(embeddings), dtype=np.float64))
    n = len(rows)
    covered, everything = np.zeros(n), np.arange(n)
    gains = _between(rows, everything, covered, np.ones(n), block_size)
    picks = np.zeros(min(max(k, 1), n), dtype=np.int64)
    for turn in range(len(picks)):
        top = gains.max()
        if top <= TIE:
            # All that is left coincides with what is picked.
            picks[turn:] = np.flatnonzero(gains > -np.inf)[: len(picks) - turn]
            break
        pick = picks[turn] = int(np.argmax(gains >= top - TIE * max(top, 1.0)))
        gains[pick] = -np.inf
        now = np.maximum(covered, _similarity(rows, rows[pick : pick + 1])[:, 0])
        gains -= _between(rows, np.flatnonzero(now > covered), covered, now, block_size)
        covered = now
    return picks


def _between(rows: Floats, examples: Ids, low: Floats, high: Floats, block_size: int) -> Floats:
    """For each candidate the sum over some examples of what of their similarity lies between `low` and `high`."""
    total = np.zeros(len(rows))
    for i in range(0, len(examples), block_size):
        block = examples[i : i + block_size]
        floor, ceiling = low[block, None], high[block, None]
        for j in range(0, len(rows), TILE):
            similarity = _similarity(rows[block], rows[j : j + TILE])
            total[j : j + TILE] += np.clip(similarity, floor, ceiling, out=similarity).sum(axis=0)
        total -= floor.sum()
    return total


def _similarity(rows: Floats, others: Floats) -> Floats:
    """`1 - distance / 2` of unit vectors, `(len(rows), len(others))`."""
    squared = rows @ others.T
    squared *= -2.0
    squared += 2.0
    squared[squared < COINCIDE] = 0.0
    distance = np.sqrt(squared, out=squared)
    distance *= -0.5
    distance += 1.0
    return distance
