"""SemDeDup: drop examples that are nearly the same as another one of their cluster (hf.co/papers/2303.09540)."""

import importlib
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from dsel_trl.functional.ranking import keep_count, rank_order

Floats = NDArray[np.float64]
Ids = NDArray[np.int64]

KEEP = ("hard", "easy", "random")


class ClusterOrder(NamedTuple):
    """The members of one cluster in the order in which they are kept, with what decides about each of them."""

    ids: Ids
    distance: Floats
    max_similarity: Floats


def unit_rows(embeddings: ArrayLike) -> NDArray[Any]:
    """
    Scales every row to length 1; a zero row stays zero, so it is similar to nothing.

    Args:
        embeddings (`array` of shape `(N, d)`):
            One vector per example. Half precision is raised to float32.

    Returns:
        `np.ndarray` of shape `(N, d)`.

    Raises:
        `ValueError`: if `embeddings` is not two-dimensional or not finite.
    """
    rows = _as_rows(embeddings)
    norm = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norm > 0, norm, 1)


def spherical_kmeans(
    embeddings: ArrayLike,
    num_clusters: int | None = None,
    *,
    seed: int = 0,
    iterations: int = 100,
    backend: str = "sklearn",
) -> tuple[Ids, NDArray[np.float32]]:
    """
    Clusters the directions of the embeddings.

    Args:
        embeddings (`array` of shape `(N, d)`):
            One vector per example; rows are scaled to length 1 first.
        num_clusters (`int`, *optional*):
            Number of clusters. Defaults to the square root of `N`.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the initial centroids.
        iterations (`int`, *optional*, defaults to `100`):
            Upper limit of the k-means iterations.
        backend (`str`, *optional*, defaults to `"sklearn"`):
            `"sklearn"` or `"faiss"`. Above 100,000 rows scikit-learn works in mini-batches.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: cluster of every example, int64 of shape `(N,)`; unit centroids, float32 of
        shape `(K, d)`.

    Raises:
        `ImportError`: if the backend is not installed.
        `ValueError`: if `backend` is unknown.
    """
    rows = unit_rows(embeddings).astype(np.float32)
    clusters = min(max(1, round(math.sqrt(len(rows))) if num_clusters is None else num_clusters), len(rows))
    if backend == "sklearn":
        labels, centroids = _sklearn_kmeans(rows, clusters, seed, iterations)
    elif backend == "faiss":
        labels, centroids = _faiss_kmeans(rows, clusters, seed, iterations)
    else:
        raise ValueError(f'`backend` must be "sklearn" or "faiss", got {backend!r}')
    return labels.astype(np.int64), unit_rows(centroids).astype(np.float32)


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
            Unit vectors, for example from [`unit_rows`].
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
    rows, centers = _as_rows(embeddings), _as_rows(centroids)
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
    values = _as_rows(rows)
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
    >>> from dsel_trl.functional.semdedup import max_similarity, rank_clusters, semdedup_keep

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


def require_backend(backend: str = "sklearn") -> None:
    """Raises `ImportError`, saying what to install, if the library of a clustering backend is missing."""
    module, library = {"sklearn": ("sklearn.cluster", "scikit-learn"), "faiss": ("faiss", "faiss")}[backend]
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f'backend="{backend}" needs {library}: pip install "dsel-trl[cluster]"') from error


def _sklearn_kmeans(
    rows: NDArray[Any], clusters: int, seed: int, iterations: int
) -> tuple[NDArray[Any], NDArray[Any]]:
    require_backend("sklearn")
    from sklearn.cluster import KMeans, MiniBatchKMeans

    kmeans: Callable[..., Any] = KMeans if len(rows) <= 100_000 else MiniBatchKMeans
    model = kmeans(n_clusters=clusters, n_init=1, max_iter=iterations, random_state=seed).fit(rows)
    return model.labels_, model.cluster_centers_


def _faiss_kmeans(rows: NDArray[Any], clusters: int, seed: int, iterations: int) -> tuple[NDArray[Any], NDArray[Any]]:
    require_backend("faiss")
    import faiss

    model: Any = faiss.Kmeans(rows.shape[1], clusters, niter=iterations, spherical=True, seed=seed)
    model.train(np.ascontiguousarray(rows))
    return model.index.search(np.ascontiguousarray(rows), 1)[1][:, 0], model.centroids


def _as_rows(values: ArrayLike) -> NDArray[Any]:
    rows = np.asarray(values)
    if rows.ndim != 2:
        raise ValueError(f"embeddings must have shape (N, d), got {rows.shape}")
    rows = rows if rows.dtype in (np.float32, np.float64) else rows.astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if len(bad):
        raise ValueError(f"the embeddings of ids {bad[:5].tolist()} ({len(bad)} in all) are not finite")
    return rows
