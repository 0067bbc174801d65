"""Which domains of a pool are worth a look for a target: the test that comes before a selection."""

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from ..ranking import bottom_k
from ..sinkhorn import sinkhorn

Floats = NDArray[np.float64]
Ids = NDArray[np.int64]


def most_relevant(
    vectors: ArrayLike,
    domains: ArrayLike,
    target: ArrayLike,
    keep: int,
    *,
    samples: int = 10_000,
    metric: str = "cosine",
    rng: np.random.Generator,
) -> tuple[Ids, Floats]:
    """
    The domains whose examples are nearest to the target by optimal transport (hf.co/papers/2405.02774, C.3).

    Args:
        vectors (`array` of shape `(N, d)`):
            Embeddings of the pool; those that are not finite are left out.
        domains (`array` of int of shape `(N,)`):
            Domain of each, from 0 on.
        target (`array` of shape `(M, d)`):
            Embeddings of the target.
        keep (`int`):
            Domains to keep, clamped to those there are.
        samples (`int`, *optional*, defaults to `10_000`):
            Most examples of a domain, and of the target, that are compared.
        metric (`str`, *optional*, defaults to `"cosine"`):
            See [`~dsel_trl.functional.sinkhorn.cost_matrix`].
        rng (`np.random.Generator`):
            Draws the samples.

    Returns:
        The domains kept, nearest first, `(keep,)` int64, and each domain's distance, `(K,)` float64, NaN where none of
        its vectors is finite.
    """
    rows, codes, goal = np.asarray(vectors), np.asarray(domains), np.asarray(target)
    finite = np.isfinite(rows).all(axis=1)
    wanted = _drawn(np.flatnonzero(np.isfinite(goal).all(axis=1)), samples, rng)
    distances = np.full(int(codes.max()) + 1, np.nan)
    for domain in range(len(distances)):
        members = _drawn(np.flatnonzero(finite & (codes == domain)), samples, rng)
        if len(members) and len(wanted):
            pair = (torch.as_tensor(rows[members]), torch.as_tensor(goal[wanted]))
            distances[domain] = sinkhorn(*pair, metric=metric).cost
    return bottom_k(distances, keep), distances


def _drawn(ids: Ids, most: int, rng: np.random.Generator) -> Ids:
    return ids if len(ids) <= most else np.sort(rng.choice(ids, size=most, replace=False))
