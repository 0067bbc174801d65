"""K-means with scikit-learn or faiss, of vectors or of their directions."""

import importlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Ids = NDArray[np.int64]

# Module and library of each.
BACKENDS = {"sklearn": ("sklearn.cluster", "scikit-learn"), "faiss": ("faiss", "faiss-cpu")}


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
    rows = as_rows(embeddings)
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
        seed, iterations, backend:
            As in [`kmeans`].

    Returns:
        `tuple[np.ndarray, np.ndarray]`: cluster of every example, int64 of shape `(N,)`; unit centroids, float32 of
        shape `(K, d)`.

    Raises:
        `ImportError`: if the backend is not installed.
        `ValueError`: if `backend` is unknown.
    """
    rows = unit_rows(embeddings)
    clusters = round(math.sqrt(len(rows))) if num_clusters is None else num_clusters
    labels, centroids = kmeans(rows, clusters, seed=seed, iterations=iterations, backend=backend, spherical=True)
    return labels, unit_rows(centroids)


def kmeans(
    vectors: ArrayLike,
    num_clusters: int,
    *,
    seed: int = 0,
    iterations: int = 100,
    backend: str = "sklearn",
    spherical: bool = False,
) -> tuple[Ids, NDArray[np.float32]]:
    """
    Clusters vectors by Euclidean distance, from first centroids drawn by k-means++.

    One seed gives one result: with faiss for any number of threads, with scikit-learn up to the rounding of the sums
    that they share. The two draw differently.

    Args:
        vectors (`array` of shape `(N, d)`):
            What to cluster.
        num_clusters (`int`):
            Number of clusters, clamped to [1, N].
        seed (`int`, *optional*, defaults to `0`):
            Seed of the first centroids.
        iterations (`int`, *optional*, defaults to `100`):
            Upper limit of the k-means iterations.
        backend (`str`, *optional*, defaults to `"sklearn"`):
            `"sklearn"`, which above 100,000 rows works in mini-batches, or `"faiss"`, which above 256 rows per cluster
            finds the centroids with a random part of that size.
        spherical (`bool`, *optional*, defaults to `False`):
            Whether faiss keeps its centroids at length 1 while it works (for unit vectors).

    Returns:
        `tuple[np.ndarray, np.ndarray]`: cluster of every vector, int64 of shape `(N,)`; centroids, float32 of shape
        `(K, d)`.

    Raises:
        `ImportError`: if the backend is not installed.
        `ValueError`: if `backend` is unknown or a vector is not finite.
    """
    if backend not in BACKENDS:
        raise ValueError(f'`backend` must be "sklearn" or "faiss", got {backend!r}')
    require_backend(backend)
    rows = np.ascontiguousarray(as_rows(vectors), dtype=np.float32)
    clusters = min(max(1, num_clusters), len(rows))
    if backend == "sklearn":
        labels, centroids = _sklearn_kmeans(rows, clusters, seed, iterations)
    else:
        labels, centroids = _faiss_kmeans(rows, clusters, seed, iterations, spherical)
    return labels.astype(np.int64), centroids.astype(np.float32, copy=False)


def require_backend(backend: str = "sklearn") -> None:
    """Raises `ImportError`, saying what to install, if the library of a clustering backend is missing."""
    module, library = BACKENDS[backend]
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f'backend="{backend}" needs {library}: pip install "dsel-trl[cluster]"') from error


def _sklearn_kmeans(
    rows: NDArray[Any], clusters: int, seed: int, iterations: int
) -> tuple[NDArray[Any], NDArray[Any]]:
    from sklearn.cluster import KMeans, MiniBatchKMeans

    kind: Callable[..., Any] = KMeans if len(rows) <= 100_000 else MiniBatchKMeans
    model = kind(n_clusters=clusters, n_init=1, max_iter=iterations, random_state=seed % 2**32).fit(rows)
    return model.labels_, model.cluster_centers_


def _faiss_kmeans(
    rows: NDArray[Any], clusters: int, seed: int, iterations: int, spherical: bool
) -> tuple[NDArray[Any], NDArray[Any]]:
    import faiss

    model = faiss.Kmeans(
        rows.shape[1],
        clusters,
        niter=iterations,
        spherical=spherical,
        # A C int, where ours has no limit.
        seed=seed % 2**31,
        # From centroids drawn at random faiss leaves clear clusters merged.
        init_method=faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS,
        # Small clusters are what was asked for, nothing to warn of.
        min_points_per_centroid=1,
    )
    model.train(rows)
    return model.index.search(rows, 1)[1][:, 0], np.asarray(model.centroids)


def as_rows(values: ArrayLike) -> NDArray[Any]:
    """Vectors as a float matrix; `ValueError` naming the first bad ids unless all are finite."""
    rows = np.asarray(values)
    if rows.ndim != 2:
        raise ValueError(f"embeddings must have shape (N, d), got {rows.shape}")
    rows = rows if rows.dtype in (np.float32, np.float64) else rows.astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if len(bad):
        raise ValueError(f"the embeddings of ids {bad[:5].tolist()} ({len(bad)} in all) are not finite")
    return rows
