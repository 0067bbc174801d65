"""Adapt-infinity: scorers chosen by entropy, coverage-centred sampling (https://hf.co/papers/2410.10636)."""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..kmeans import unit_rows
from ..quotas import water_fill
from ..text.semdedup import max_similarity_to_earlier

EDGES = 50
BINS = 50
OUTLIERS = 0.05
ENTROPIES = ("scale_free", "repo")

Ids = NDArray[np.int64]
Floats = NDArray[np.float64]


def distribution_entropy(scores: ArrayLike, mode: str = "scale_free", edges: int = EDGES) -> float:
    """
    Entropy of the distribution of some scores: how much they tell examples apart (section 3.2).

    Args:
        scores (`array` of shape `(n,)`):
            Scores of one scorer in one cluster.
        mode (`str`, *optional*, defaults to `"scale_free"`):
            `"scale_free"` counts the z-scores between -4 and 4, leaves out what is not finite and gives 0 for constant
            scores. `"repo"` is the authors' code: NaN counts as 0 and the edges are at -4 to 4 times the deviation of
            the raw scores, so that it depends on their scale, and constant scores give NaN.
        edges (`int`, *optional*, defaults to `50`):
            Edges of the bins.

    Returns:
        `float`: in bits.

    Raises:
        `ValueError`: if `mode` is unknown.
    """
    if mode not in ENTROPIES:
        raise ValueError(f"mode must be one of {list(ENTROPIES)}, but is {mode!r}")
    values = np.asarray(scores, dtype=np.float64)
    if mode == "repo":
        values = np.nan_to_num(values, nan=0.0)
        deviation = limit = float(values.std())
    else:
        values = values[np.isfinite(values)]
        deviation, limit = float(values.std()) if len(values) else 0.0, 1.0
        # The deviation of equal values can be a rounding error.
        if not len(values) or deviation <= 1e-12 * max(1.0, float(np.abs(values).max())):
            return 0.0
    with np.errstate(invalid="ignore", divide="ignore"):
        z = (values - values.mean()) / deviation
        borders = np.linspace(-4 * limit, 4 * limit, edges)
        # Bin k is (edge k - 1, edge k]; what lies on or below the first edge, or above the last, is in none.
        where = np.searchsorted(borders, z, side="left")
        counts = np.bincount(where[(where > 0) & (where < edges)], minlength=edges)
        shares = counts / counts.sum()
    if not counts.sum():
        return math.nan if mode == "repo" else 0.0
    shares = np.where(shares > 0, shares, np.finfo(np.float64).eps if mode == "repo" else 1.0)
    return float(-(shares * np.log2(shares)).sum())


def most_entropic(
    scores: Mapping[str, ArrayLike], labels: ArrayLike, clusters: int, mode: str = "scale_free"
) -> tuple[list[str], dict[str, list[float]]]:
    """
    The scorer of each cluster: the one whose scores have the most entropic distribution there (section 3.2).

    Args:
        scores (`Mapping[str, array]`):
            Scores `(N,)` of all examples by scorer; between equal entropies the earlier scorer goes first.
        labels (`array` of int of shape `(N,)`):
            Cluster of each example; one that is negative belongs to none.
        clusters (`int`):
            Number of clusters.
        mode (`str`, *optional*, defaults to `"scale_free"`):
            As in [`distribution_entropy`].

    Returns:
        `tuple[list[str], dict[str, list[float]]]`: the scorer of each cluster, and all entropies by scorer.
    """
    groups = [np.asarray(labels) == cluster for cluster in range(clusters)]
    entropies = {
        name: [distribution_entropy(np.asarray(values)[group], mode) for group in groups]
        for name, values in scores.items()
    }
    names = list(entropies)
    table = np.nan_to_num(np.array([entropies[name] for name in names]), nan=-np.inf)
    return [names[best] for best in table.argmax(axis=0).tolist()], entropies


def outlier_bounds(scores: ArrayLike, share: float = OUTLIERS) -> tuple[float, float]:
    """
    The scores between which coverage-centred sampling works: all but the extreme `share` at either end.

    Args:
        scores (`array` of shape `(n,)`):
            Finite scores.
        share (`float`, *optional*, defaults to `0.05`):
            Share of outliers at each end.

    Returns:
        `tuple[float, float]`: the lowest and the highest score.
    """
    ordered = np.sort(np.asarray(scores, dtype=np.float64))
    return float(ordered[int(share * len(ordered))]), float(ordered[int((1 - share) * len(ordered))])


def coverage_sample(
    scores: ArrayLike,
    budget: int,
    *,
    bins: int = BINS,
    strict: bool = True,
    rng: np.random.Generator | None = None,
) -> Ids:
    """
    Coverage-centred stratified sampling: the same number from each stretch of the scores (hf.co/papers/2210.15809).

    Stretches of equal width between the outliers are visited from the highest on.

    Args:
        scores (`array` of shape `(n,)`):
            Finite scores of one cluster.
        budget (`int`):
            Examples wanted.
        bins (`int`, *optional*, defaults to `50`):
            Stretches.
        strict (`bool`, *optional*, defaults to `True`):
            Whether the share is worked out anew after each stretch, the lowest score belongs to the last one, and what
            is missing in the end comes from what is left, outliers last: then exactly `min(budget, n)` examples are
            taken. The published code does none of this: it may take more than the budget, or fewer.
        rng (`np.random.Generator`, *optional*):
            Draws inside a stretch; without it the lowest positions are taken.

    Returns:
        `np.ndarray` of int64: positions; with `strict` in ascending order, else in that of the draw.

    Raises:
        `ValueError`: if a score is not finite.
    """
    values = np.asarray(scores, dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError(f"{int((~np.isfinite(values)).sum())} of {len(values)} scores are not finite")
    if budget <= 0 or not len(values):
        return np.empty(0, dtype=np.int64)
    low, high = outlier_bounds(values)

    def draw(found: Ids, count: int) -> Ids:
        return found[:count] if rng is None else np.asarray(rng.choice(found, count, replace=False), dtype=np.int64)

    chosen: list[Ids] = []
    borders = np.linspace(low, high, bins + 1)
    left, quota = budget, math.ceil(budget / bins)
    for place in range(bins):
        bottom, top = borders[bins - place - 1], borders[bins - place]
        last = strict and place == bins - 1
        found = np.flatnonzero((values <= top) & (values >= low if last else values > bottom))
        if strict:
            quota = math.ceil(left / (bins - place))
        taken = found if len(found) < quota else draw(found, quota)
        chosen.append(taken)
        if strict:
            left -= len(taken)
        elif len(found) < quota and place < bins - 1:
            quota = math.ceil((left - len(taken)) / (bins - place - 1))
            left -= len(taken)
    result = np.concatenate(chosen)
    if not strict:
        return result
    inside = (values >= low) & (values <= high)
    for candidates in (np.flatnonzero(inside), np.flatnonzero(~inside)):
        rest = np.setdiff1d(candidates, result)
        missing = min(budget, len(values)) - len(result)
        if missing > 0:
            result = np.concatenate([result, draw(rest, min(missing, len(rest)))])
    return np.sort(result)


def similarity_in_clusters(embeddings: ArrayLike, labels: ArrayLike) -> Floats:
    """
    Largest cosine similarity of each example to those before it in its cluster (section 3.4).

    Args:
        embeddings (`array` of shape `(N, d)`):
            One vector per example; scaled to length 1 first.
        labels (`array` of int of shape `(N,)`):
            Cluster of each example.

    Returns:
        `np.ndarray` of float64 of shape `(N,)`: in [0, 1]; 0 for the first of a cluster.
    """
    rows, groups = unit_rows(embeddings), np.asarray(labels)
    similarity = np.zeros(len(rows))
    for cluster in np.unique(groups):
        members = np.flatnonzero(groups == cluster)
        similarity[members] = max_similarity_to_earlier(rows[members])
    return similarity


def without_duplicates(similarity: ArrayLike, labels: ArrayLike, budget: int, *, trim: bool = True) -> Ids:
    """
    Permanent pruning: in each cluster the examples that are the least similar to an earlier one stay (section 3.4).

    Args:
        similarity (`array` of shape `(N,)`):
            From [`similarity_in_clusters`].
        labels (`array` of int of shape `(N,)`):
            Cluster of each example; one that is negative belongs to none and goes.
        budget (`int`):
            Examples that stay in all, shared out by [`~dsel_trl.functional.quotas.water_fill`].
        trim (`bool`, *optional*, defaults to `True`):
            As there.

    Returns:
        `np.ndarray` of int64: ids that stay, in ascending order; of equals the lower id.
    """
    values, groups = np.asarray(similarity, dtype=np.float64), np.asarray(labels)
    names = np.unique(groups[groups >= 0])
    shares = water_fill([int((groups == name).sum()) for name in names], budget, trim=trim)
    kept = []
    for name, share in zip(names, shares, strict=True):
        members = np.flatnonzero(groups == name)
        kept.append(members[np.argsort(values[members], kind="stable")[:share]])
    return np.sort(np.concatenate(kept)) if kept else np.empty(0, dtype=np.int64)


def choose_in_clusters(
    scores: Mapping[str, Floats],
    chosen: Sequence[str],
    labels: Ids,
    budget: int,
    rng: np.random.Generator,
    bins: int = BINS,
) -> Ids:
    """
    Examples to train on: each cluster's share of the budget, sampled by its own scorer (section 3.3).

    Args:
        scores (`Mapping[str, np.ndarray]`):
            Scores `(N,)` by scorer; what is not finite counts as the cluster's median.
        chosen (`Sequence[str]`):
            The scorer of each cluster, from [`most_entropic`].
        labels (`np.ndarray` of int of shape `(N,)`):
            Cluster of each example; one that is negative is not chosen.
        budget (`int`):
            Examples wanted.
        rng (`np.random.Generator`):
            Draws inside a stretch of scores.
        bins (`int`, *optional*, defaults to `50`):
            Stretches of scores.

    Returns:
        `np.ndarray` of int64: ids in ascending order.
    """
    groups = [np.flatnonzero(labels == cluster) for cluster in range(len(chosen))]
    picked = []
    for members, name, share in zip(groups, chosen, water_fill([len(m) for m in groups], budget), strict=True):
        values = scores[name][members].astype(np.float64)
        known = np.isfinite(values)
        values = np.where(known, values, np.median(values[known]) if known.any() else 0.0)
        picked.append(members[coverage_sample(values, int(share), bins=bins, rng=rng)])
    return np.sort(np.concatenate(picked))


def directional_derivative(loss_at: Callable[[float], ArrayLike], eps: float = 1e-3) -> Floats:
    """
    Derivative of losses along a direction, by a central difference: two forwards, no backward.

    Args:
        loss_at (`Callable[[float], array]`):
            Losses with the parameters moved by so many times the direction.
        eps (`float`, *optional*, defaults to `1e-3`):
            How far to go to either side.

    Returns:
        `np.ndarray` of float64 of the losses' shape.

    Raises:
        `ValueError`: if `eps` is not positive.
    """
    if not eps > 0:
        raise ValueError(f"eps must be positive, but is {eps}")
    ahead, back = (np.asarray(loss_at(step), dtype=np.float64) for step in (eps, -eps))
    return (ahead - back) / (2 * eps)
