"""SemDeDup: drop examples that are nearly the same as another one of their cluster (hf.co/papers/2303.09540)."""

import math
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from ..kmeans import as_rows
from ..ranking import keep_count, rank_order

Floats = NDArray[np.float64]
Ids = NDArray[np.int64]

KEEP = ("hard", "easy", "random")


class ClusterOrder(NamedTuple):
    """The members of one cluster in the order in which they are kept, with what decides about each of them."""

    ids: Ids
    distance: Floats
    max_similarity: Floats


def rank_clusters(
    embeddings: ArrayLike,
    labels: ArrayLike,
    centroids: ArrayLike,
    *,
    keep: str = "hard",
    rng: np.random.Generator | None = None,
    block_size: int = 1024,
    clip: bool = True,
) -> list[ClusterOrder]:
    """
    Orders each cluster and finds how similar every member is to the ones before it (hf.co/papers/2303.09540, Alg. 1).

    Members that come earlier count even when they are dropped themselves. Duplicates that lie in different clusters
    are not found.

    Args:
        embeddings (`array` of shape `(N, d)`):
            Unit vectors, for example from [`~dsel_trl.functional.kmeans.unit_rows`].
        labels (`array` of int of shape `(N,)`):
            Cluster of every example.
        centroids (`array` of shape `(K, d)`):
            Centroids; only their direction counts.
        keep (`str`, *optional*, defaults to `"hard"`):
            Which member of a group of duplicates comes first: the one far from the centroid (`"hard"`), the one near
            it (`"easy"`), or a random one.
        rng (`np.random.Generator`, *optional*):
            Needed for `keep="random"`.
        block_size (`int`, *optional*, defaults to `1024`):
            Rows of the similarity matrix that are held in memory at once.
        clip (`bool`, *optional*, defaults to `True`):
            See [`max_similarity_to_earlier`].

    Returns:
        `list[ClusterOrder]`: one entry per centroid; empty clusters have empty arrays.

    Raises:
        `ValueError`: if `keep` is unknown, `rng` is missing or a label has no centroid.
    """
    if keep not in KEEP:
        raise ValueError(f'`keep` must be "hard", "easy" or "random", got {keep!r}')
    if keep == "random" and rng is None:
        raise ValueError('`keep="random"` needs `rng`, for example numpy.random.default_rng(seed)')
    rows, centers = as_rows(embeddings), as_rows(centroids)
    cluster = np.asarray(labels, dtype=np.int64)
    if len(cluster) and not (cluster.min() >= 0 and cluster.max() < len(centers)):
        raise ValueError(
            f"labels reach from {cluster.min()} to {cluster.max()}, but there are {len(centers)} centroids"
        )
    grouped = np.argsort(cluster, kind="stable")
    starts = np.searchsorted(cluster[grouped], np.arange(len(centers) + 1))
    orders = []
    for number, (start, stop) in enumerate(pairwise(starts)):
        members = grouped[start:stop]
        distance = _cosine_distance(rows[members], centers[number])
        order = rank_order(distance, descending=True)
        if keep == "easy":
            order = order[::-1]
        elif rng is not None and keep == "random":
            order = rng.permutation(order)
        ranked = members[order]
        similarity = max_similarity_to_earlier(rows[ranked], block_size=block_size, clip=clip)
        orders.append(ClusterOrder(ranked, distance[order], similarity))
    return orders


def max_similarity_to_earlier(rows: ArrayLike, *, block_size: int = 1024, clip: bool = True) -> Floats:
    """
    Largest cosine similarity of every row to the rows before it.

    Args:
        rows (`array` of shape `(n, d)`):
            Unit vectors in order.
        block_size (`int`, *optional*, defaults to `1024`):
            Rows of the similarity matrix that are held in memory at once.
        clip (`bool`, *optional*, defaults to `True`):
            Take what rounding puts above 1 for 1. The published code does not, so `eps = 0` drops some duplicates.

    Returns:
        `np.ndarray` of float64 of shape `(n,)`: in [0, 1]; 0 for the first row, and where all are negative.
    """
    values = as_rows(rows)
    largest = np.zeros(len(values))
    for start in range(0, len(values), block_size):
        block = values[start : start + block_size]
        similarity = block @ values[: start + len(block)].T
        # A row may look at earlier rows only: inside its own block that is the part below the diagonal.
        similarity = np.tril(similarity, k=start - 1)
        largest[start : start + len(block)] = similarity.max(axis=1)
    return np.clip(largest, 0.0, 1.0 if clip else None)


def max_similarity(orders: list[ClusterOrder], n: int) -> Floats:
    """
    Collects the largest similarity of every example from its cluster.

    Args:
        orders (`list[ClusterOrder]`):
            Result of [`rank_clusters`].
        n (`int`):
            Number of examples.

    Returns:
        `np.ndarray` of float64 of shape `(n,)`.
    """
    collected = np.zeros(n)
    for order in orders:
        collected[order.ids] = order.max_similarity
    return collected


def semdedup_keep(similarity: ArrayLike, eps: float) -> Ids:
    """
    Ids that survive: those not more similar than `1 - eps` to an earlier member (hf.co/papers/2303.09540, section 3).

    Args:
        similarity (`array` of shape `(N,)`):
            Result of [`max_similarity`].
        eps (`float`):
            Larger values drop more. At 0 nothing is dropped.

    Returns:
        `np.ndarray` of int64: ids in ascending order.

    Raises:
        `ValueError`: if `eps` is negative.

    Example:

    ```python
    >>> from dsel_trl.functional.text.semdedup import max_similarity, rank_clusters, semdedup_keep

    >>> orders = rank_clusters([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]], labels=[0, 0, 0], centroids=[[1.0, 1.0]])
    >>> semdedup_keep(max_similarity(orders, 3), eps=0.3).tolist()
    [0, 1]
    ```
    """
    if not eps >= 0:
        raise ValueError(f"`eps` must not be negative, got {eps}")
    return np.flatnonzero(~(np.asarray(similarity, dtype=np.float64) > 1 - eps)).astype(np.int64)


def eps_for_fraction(similarity: ArrayLike, fraction: float) -> float:
    """
    The largest `eps` that still keeps at least the wanted fraction of the examples.

    Args:
        similarity (`array` of shape `(N,)`):
            Result of [`max_similarity`].
        fraction (`float`):
            Fraction of the examples to keep, in (0, 1].

    Returns:
        `float`: more than the fraction is kept only where similarities are equal.

    Raises:
        `ValueError`: if `fraction` is not in (0, 1].
    """
    ordered = np.sort(np.asarray(similarity, dtype=np.float64))
    border = float(ordered[keep_count(fraction, len(ordered)) - 1])
    eps = 1 - border
    # 1 - (1 - border) may fall an ulp short of the border, which would drop the example the cut is made at.
    return eps if 1 - eps >= border else math.nextafter(eps, 0.0)


def _cosine_distance(rows: NDArray[Any], center: NDArray[Any]) -> Floats:
    similarity = torch.nn.functional.cosine_similarity(
        torch.as_tensor(rows, dtype=torch.float32), torch.as_tensor(center, dtype=torch.float32)[None], dim=1
    )
    return (1 - similarity).numpy().astype(np.float64)
