"""
One probability out of an opinion on each label, and whether it can be believed.

An opinion is positive where it agrees with the label. The model: the truth follows a logistic function of the opinion,
and of the labels a share `rate` has been turned at random (hf.co/papers/1609.03683, whose anchor points are here the
pairs of the surest opinions).
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

# Beyond one half no audit by the labels themselves can work.
HIGHEST_RATE = 0.49
# Parts of like sureness in which labels are counted.
MOST_PARTS = 256


class NoiseModel(NamedTuple):
    """
    Attributes:
        slope (`float`):
            Log-odds of the truth per unit of the opinion, not negative.
        rate (`float`):
            Share of the labels that are wrong.
    """

    slope: float
    rate: float


def _sigmoid(values: NDArray[np.float64]) -> NDArray[np.float64]:
    result: NDArray[np.float64] = 0.5 * (1.0 + np.tanh(0.5 * values))
    return result


def agreement_weights(opinions: NDArray[Any]) -> NDArray[np.float64]:
    """
    How much each of several opinions counts: as far as it agrees with the labels on average, or not at all.

    Of opinions that are independent and of one size, these are the weights of the best sum.

    Args:
        opinions (`np.ndarray` of shape `(M, N)`):
            Held-out opinions of root mean square 1, positive where they agree with the label.

    Returns:
        `np.ndarray` of float64 of shape `(M,)`, not negative, of sum 1; equal ones where none agrees.
    """
    agreed = np.maximum(np.mean(opinions, axis=1, dtype=np.float64), 0.0)
    total = float(agreed.sum())
    result: NDArray[np.float64] = agreed / total if total > 0 else np.full(len(agreed), 1.0 / len(agreed))
    return result


def anchored_rate(opinions: NDArray[Any], share: float = 0.2) -> float:
    """
    Share of wrong labels: how many labels the surest opinions contradict.

    Args:
        opinions (`np.ndarray` of shape `(N,)`):
            Held-out opinions, positive where they agree with the label.
        share (`float`, *optional*, defaults to `0.2`):
            Share of the pairs that count as sure. The fewer, the nearer to the truth and the less exact.

    Returns:
        `float` in [0, 0.49]. One contradiction and one agreement are assumed beside those that are seen. Too high
        where even the surest opinions are wrong at times.
    """
    sure = np.abs(opinions)
    anchors = opinions[sure >= np.quantile(sure, 1.0 - share)]
    return min((float(np.count_nonzero(anchors < 0)) + 1.0) / (len(anchors) + 2.0), HIGHEST_RATE)


def rate_interval(opinions: NDArray[Any], level: float = 0.9) -> tuple[float, float]:
    """
    The shares of wrong labels that the labels allow.

    [`anchored_rate`] takes every contradiction of a sure opinion for a wrong label. But it may be the opinion that is
    wrong, as it often is where a few hundred labels taught it; how agreement grows with sureness tells the two apart,
    as far as they can be told.

    Args:
        opinions (`np.ndarray` of shape `(N,)`):
            Held-out opinions, positive where they agree with the label; of size about 1.
        level (`float`, *optional*, defaults to `0.9`):
            How much of the posterior lies inside.

    Returns:
        `tuple[float, float]`: the ends of the central interval, in [0, 0.49], where before the labels were seen all
        shares, and all slopes of [`fit_noise_model`] on a scale of logarithms, are equally likely.
    """
    rates, slopes = np.linspace(0.0, HIGHEST_RATE, 99), np.geomspace(0.1, 20.0, 32)
    sure = np.abs(np.asarray(opinions, dtype=np.float64))
    parts = np.array_split(np.argsort(sure, kind="stable"), min(MOST_PARTS, max(1, len(sure))))
    sizes = np.array([len(part) for part in parts], dtype=np.float64)
    agreed = np.array([np.count_nonzero(np.asarray(opinions)[part] > 0) for part in parts], dtype=np.float64)
    middles = np.array([sure[part].mean() if len(part) else 0.0 for part in parts], dtype=np.float64)
    clean = _sigmoid(slopes[:, None] * middles)
    agree = rates[:, None, None] + (1.0 - 2.0 * rates[:, None, None]) * clean
    logs = (np.log(np.maximum(agree, 1e-12)) * agreed).sum(axis=-1)
    logs += (np.log(np.maximum(1.0 - agree, 1e-12)) * (sizes - agreed)).sum(axis=-1)
    shares = np.exp(logs - logs.max()).sum(axis=1)
    below = np.cumsum(shares) / shares.sum()
    low, high = (rates[np.searchsorted(below, edge)] for edge in ((1.0 - level) / 2.0, (1.0 + level) / 2.0))
    return float(low), float(high)


def fit_noise_model(opinions: NDArray[Any], rate: float, *, prior: float = 0.1) -> NoiseModel:
    """
    The slope of the largest likelihood where a share `rate` of the labels is wrong.

    Args:
        opinions (`np.ndarray` of shape `(N,)`):
            Held-out opinions, positive where they agree with the label; of size about 1.
        rate (`float`):
            Share of wrong labels, in [0, 0.5).
        prior (`float`, *optional*, defaults to `0.1`):
            Precision of a normal prior on the slope, in pairs: what keeps it finite where all labels agree.

    Returns:
        [`NoiseModel`]. The slope is looked for on a grid from 0 to 50 that gets finer: the likelihood need not have
        one hill only.

    Raises:
        `ValueError`: if `rate` is not in [0, 0.5).
    """
    if not 0 <= rate < 0.5:
        raise ValueError(f"the share of wrong labels must be in [0, 0.5), but is {rate}")
    values = np.asarray(opinions, dtype=np.float64)

    def likelihood(slope: float) -> float:
        agree = rate + (1.0 - 2.0 * rate) * _sigmoid(slope * values)
        return float(np.log(np.maximum(agree, 1e-300)).sum()) - 0.5 * prior * slope**2

    grid = np.concatenate([[0.0], np.geomspace(0.01, 50.0, 40)])
    for _ in range(3):
        best = int(np.argmax([likelihood(slope) for slope in grid.tolist()]))
        slope = float(grid[best])
        grid = np.linspace(grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)], 17)
    return NoiseModel(slope, rate)


def agreement_probability(opinions: NDArray[Any], model: NoiseModel) -> NDArray[np.float64]:
    """
    Probability that a pair carries the label that it carries, right or not: what held-out labels can test.

    Args:
        opinions (`np.ndarray` of shape `(N,)`):
            Held-out opinions.
        model ([`NoiseModel`]):
            Fitted on other pairs.

    Returns:
        `np.ndarray` of float64 of shape `(N,)`, in `[rate, 1 - rate]`.
    """
    clean = _sigmoid(model.slope * np.asarray(opinions, dtype=np.float64))
    return model.rate + (1.0 - 2.0 * model.rate) * clean


def wrong_probability(opinions: NDArray[Any], model: NoiseModel) -> NDArray[np.float64]:
    """Probability that the label of a pair is wrong, given it and the opinion; as [`agreement_probability`]."""
    clean = _sigmoid(model.slope * np.asarray(opinions, dtype=np.float64))
    wrong = model.rate * (1.0 - clean)
    total = wrong + (1.0 - model.rate) * clean
    return np.divide(wrong, total, out=np.full_like(total, 0.5), where=total > 0)


def reliability(
    probabilities: NDArray[Any], happened: NDArray[np.bool_], bins: int = 10
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """
    Points of a reliability plot.

    Args:
        probabilities (`np.ndarray` of shape `(N,)`):
            What was foretold; NaN is left out.
        happened (`np.ndarray` of bool of shape `(N,)`):
            What happened.
        bins (`int`, *optional*, defaults to `10`):
            Bins of as many pairs each.

    Returns:
        `tuple`: mean probability, share that happened and number of pairs of each bin that has any.
    """
    known = np.flatnonzero(np.isfinite(probabilities))
    order = known[np.argsort(probabilities[known], kind="stable")]
    parts = [part for part in np.array_split(order, bins) if len(part)]
    foretold = np.array([np.mean(probabilities[part]) for part in parts], dtype=np.float64)
    seen = np.array([np.mean(happened[part]) for part in parts], dtype=np.float64)
    return foretold, seen, np.array([len(part) for part in parts], dtype=np.int64)


def expected_calibration_error(probabilities: NDArray[Any], happened: NDArray[np.bool_], bins: int = 10) -> float:
    """Mean distance between what was foretold and what happened over the bins of [`reliability`], by their sizes."""
    foretold, seen, sizes = reliability(probabilities, happened, bins)
    return float(np.average(np.abs(foretold - seen), weights=sizes)) if len(sizes) else float("nan")


def area_under_curve(scores: NDArray[Any], positive: NDArray[np.bool_]) -> float:
    """
    Area under the ROC curve: how often a positive has the higher score; equal scores count half.

    Args:
        scores (`np.ndarray` of shape `(N,)`):
            Higher = more likely positive; no NaN.
        positive (`np.ndarray` of bool of shape `(N,)`):
            Which are.

    Returns:
        `float`; NaN where all or none are positive.
    """
    values, own = np.unique(np.asarray(scores), return_inverse=True)
    counts = np.bincount(own, minlength=len(values))
    ranks = (np.cumsum(counts) - (counts - 1) / 2.0)[own]
    ups = int(np.count_nonzero(positive))
    downs = len(ranks) - ups
    if not ups or not downs:
        return float("nan")
    return float((ranks[positive].sum() - ups * (ups + 1) / 2) / (ups * downs))
