"""S2L: spreads a budget over clusters of loss trajectories (https://hf.co/papers/2403.07384)."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..kmeans import require_backend
from ..ranking import Ids


def loss_trajectories(losses: ArrayLike, num_checkpoints: int | None = None) -> NDArray[np.float32]:
    """
    Loss trajectories as vectors to cluster.

    Args:
        losses (array-like of shape `(n, T)`):
            Loss of each example at each checkpoint: mean token loss, or DPO loss of the pair. Non-finite ones become
            0.
        num_checkpoints (`int`, *optional*):
            Thins to every `floor(T / num_checkpoints)`-th checkpoint.

    Returns:
        `np.ndarray` of float32, shape `(n, T')`.

    Raises:
        `ValueError`: if `losses` is not two-dimensional or `num_checkpoints` is below 1.
    """
    values = np.asarray(losses, dtype=np.float32)
    if values.ndim != 2:
        raise ValueError(f"losses must have shape (examples, checkpoints), but have shape {values.shape}")
    if num_checkpoints is not None:
        if num_checkpoints < 1:
            raise ValueError(f"num_checkpoints must be at least 1, but is {num_checkpoints}")
        values = values[:, :: max(values.shape[1] // num_checkpoints, 1)]
    return np.where(np.isfinite(values), values, np.float32(0.0))


def cluster_trajectories(
    trajectories: ArrayLike, rng: np.random.Generator, n_clusters: int = 100, iterations: int = 20
) -> Ids:
    """
    Clusters loss trajectories by Euclidean k-means (scikit-learn).

    Args:
        trajectories (array-like of shape `(n, T)`):
            From [`loss_trajectories`].
        rng (`np.random.Generator`):
            Seeds the first centers.
        n_clusters (`int`, *optional*, defaults to `100`):
            Number of clusters, fewer if there are fewer distinct trajectories.
        iterations (`int`, *optional*, defaults to `20`):
            Largest number of refinements.

    Returns:
        `np.ndarray` of int64, shape `(n,)`: the cluster of each example; equal trajectories share one.

    Raises:
        `ImportError`: if scikit-learn is not installed.
        `ValueError`: if `n_clusters` is below 1.
    """
    if n_clusters < 1:
        raise ValueError(f"n_clusters must be at least 1, but is {n_clusters}")
    rows = np.asarray(trajectories, dtype=np.float32)
    if len(rows) == 0:
        return np.empty(0, dtype=np.int64)
    require_backend("sklearn")
    from sklearn.cluster import KMeans

    distinct = len(np.unique(rows, axis=0))
    kmeans = KMeans(
        n_clusters=min(n_clusters, distinct), n_init=1, max_iter=iterations, random_state=int(rng.integers(2**31))
    )
    return np.asarray(kmeans.fit_predict(rows), dtype=np.int64)


def balanced_quotas(sizes: Sequence[int], budget: int) -> list[int]:
    """
    Divides a budget over groups as evenly as their sizes allow: from the smallest group on, each gets
    `remaining budget // remaining groups`, or all it has.

    Args:
        sizes (sequence of `int`):
            Group sizes.
        budget (`int`):
            What to divide.

    Returns:
        list of `int`: quotas in the order of `sizes`; among equal sizes the first is served first.

    Raises:
        `ValueError`: if `budget` is negative.
    """
    if budget < 0:
        raise ValueError(f"the budget cannot be negative, but is {budget}")
    quotas = [0] * len(sizes)
    for served, group in enumerate(sorted(range(len(sizes)), key=lambda index: sizes[index])):
        quotas[group] = min(budget // (len(sizes) - served), sizes[group])
        budget -= quotas[group]
    return quotas


def s2l_select(
    labels: ArrayLike,
    budget: int,
    rng: np.random.Generator,
    sources: ArrayLike | None = None,
    min_size: int = 2,
) -> Ids:
    """
    Draws examples from clusters, each cluster the same number as far as it reaches.

    Args:
        labels (array-like of int, shape `(n,)`):
            Cluster of each example.
        budget (`int`):
            Number of examples; clamped to [1, n].
        rng (`np.random.Generator`):
            Draws inside the clusters.
        sources (array-like of shape `(n,)`, *optional*):
            Data source of each example. The budget is divided over the sources first, by the same rule.
        min_size (`int`, *optional*, defaults to `2`):
            Clusters of this size or smaller are used, pooled, only if budget is left.

    Returns:
        `np.ndarray` of int64: distinct ids in ascending order.
    """
    clusters = np.asarray(labels)
    budget = min(max(budget, 1), len(clusters))
    if sources is None:
        return _select_from(np.arange(len(clusters)), clusters, budget, rng, min_size)
    groups = _members(np.asarray(sources), np.arange(len(clusters)))
    picks = [
        _select_from(group, clusters[group], quota, rng, min_size)
        for group, quota in zip(groups, balanced_quotas([len(group) for group in groups], budget), strict=True)
    ]
    return np.sort(np.concatenate(picks))


def _members(labels: NDArray[np.generic], ids: Ids) -> list[Ids]:
    order = np.argsort(labels, kind="stable")
    borders = np.flatnonzero(np.diff(np.unique(labels, return_inverse=True)[1][order])) + 1
    return np.split(ids[order], borders)


def _select_from(ids: Ids, labels: NDArray[np.generic], budget: int, rng: np.random.Generator, min_size: int) -> Ids:
    groups = _members(labels, ids)
    large = [group for group in groups if len(group) > min_size]
    small = [group for group in groups if len(group) <= min_size]
    quotas = balanced_quotas([len(group) for group in large], budget)
    picks = [rng.choice(group, size=quota, replace=False) for group, quota in zip(large, quotas, strict=True)]
    picked = np.concatenate([np.empty(0, dtype=np.int64), *picks])
    for pool in (np.concatenate([np.empty(0, dtype=np.int64), *small]), ids):
        rest = np.setdiff1d(pool, picked)
        count = min(budget - len(picked), len(rest))
        picked = np.concatenate([picked, rng.choice(rest, size=count, replace=False)])
    return np.sort(picked)
