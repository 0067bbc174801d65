"""D4: SemDeDup, then clusters again and the most typical examples dropped (hf.co/papers/2308.12284)."""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..kmeans import spherical_kmeans, unit_rows
from ..ranking import selectable, top_k
from .semdedup import eps_for_fraction, max_similarity, rank_clusters, semdedup_keep

Ids = NDArray[np.int64]


def prototype_keep(distance: ArrayLike, keep_ratio: float) -> Ids:
    """
    Keeps the examples farthest from their centroid (hf.co/papers/2308.12284, section 3.4, "SSL prototypes").

    Args:
        distance (`array` of shape `(N,)`):
            Distance of every example to the centroid of its own cluster. Non-finite entries are not selectable.
        keep_ratio (`float`):
            Fraction to keep, in (0, 1]; `round(keep_ratio * N)` examples, at least one.

    Returns:
        `np.ndarray` of int64: ids in ascending order; ties at the border go to the lower id.

    Raises:
        `ValueError`: if `keep_ratio` is not in (0, 1].

    Example:

    ```python
    >>> from dsel_trl.functional.text.d4 import prototype_keep

    >>> prototype_keep([0.1, 0.9, 0.5], keep_ratio=0.67).tolist()
    [1, 2]
    ```
    """
    if not 0 < keep_ratio <= 1:
        raise ValueError(f"`keep_ratio` must lie in (0, 1], got {keep_ratio}")
    k = round(keep_ratio * int(np.count_nonzero(selectable(distance))))
    return np.sort(top_k(distance, max(1, k)))


def d4_select(
    embeddings: ArrayLike,
    *,
    dedup_ratio: float = 0.75,
    proto_ratio: float = 0.5,
    num_clusters: int | None = None,
    seed: int = 0,
    cluster: Callable[..., tuple[Ids, NDArray[np.float32]]] = spherical_kmeans,
) -> Ids:
    """
    Both stages of D4; the kept fraction is `dedup_ratio * proto_ratio` (hf.co/papers/2308.12284, section 3.4).

    Args:
        embeddings (`array` of shape `(N, d)`):
            One vector per example.
        dedup_ratio (`float`, *optional*, defaults to `0.75`):
            Fraction that SemDeDup keeps. Equal similarities at the border are kept together.
        proto_ratio (`float`, *optional*, defaults to `0.5`):
            Fraction of the survivors that lies farthest from the centroids and is kept.
        num_clusters (`int`, *optional*):
            Clusters of both stages. Defaults to the square root of the number of examples.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the clustering.
        cluster (`Callable`, *optional*, defaults to [`spherical_kmeans`]):
            Called as `cluster(rows, num_clusters, seed=seed)`; returns labels and centroids.

    Returns:
        `np.ndarray` of int64: ids in ascending order.

    Raises:
        `ImportError`: if the clustering backend is not installed.
        `ValueError`: if a ratio is out of range.
    """
    rows = unit_rows(embeddings)
    labels, centroids = cluster(rows, num_clusters, seed=seed)
    similarity = max_similarity(rank_clusters(rows, labels, centroids), len(rows))
    survivors = semdedup_keep(similarity, eps_for_fraction(similarity, dedup_ratio))
    labels, centroids = cluster(rows[survivors], num_clusters, seed=seed)
    distance = 1 - np.einsum("nd,nd->n", rows[survivors], centroids[labels])
    return survivors[prototype_keep(distance, proto_ratio)]
