"""JSD relevance: how like each example's words are to those of a target."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..text.dsir import HashedNgrams

Floats = NDArray[np.float64]


def jensen_shannon(hashed: HashedNgrams, target: ArrayLike) -> Floats:
    """
    Jensen-Shannon divergence of each text's n-grams from a target's (hf.co/papers/1707.05246, section 3.1), in bits.

    `(KL(p | m) + KL(q | m)) / 2`, `m` being the mean of `p` and `q`: 0 for equal distributions, 1 for such that have
    no n-gram in common.

    Args:
        hashed ([`~dsel_trl.functional.text.dsir.HashedNgrams`]):
            The n-grams of N texts.
        target (`array` of shape `(B,)`):
            Distribution of the target's n-grams over the buckets; sums to 1.

    Returns:
        `np.ndarray` of float64 of shape `(N,)` in [0, 1]; NaN for a text without an n-gram.

    Raises:
        `ValueError`: if the target does not sum to 1.
    """
    goal = np.asarray(target, dtype=np.float64)
    if not np.isclose(goal.sum(), 1.0):
        raise ValueError(f"The target's distribution sums to {goal.sum():g}, not to 1.")
    sizes = np.diff(hashed.offsets)
    # One entry per text and bucket in it: what a text lacks adds half of the target's share there, and no more.
    owners = np.repeat(np.arange(len(sizes)), sizes)
    keys, counts = np.unique(owners * len(goal) + hashed.buckets, return_counts=True)
    texts, buckets = keys // len(goal), keys % len(goal)
    own, theirs = counts / sizes[texts], goal[buckets]
    middle = (own + theirs) / 2
    ratio = np.divide(theirs, middle, out=np.ones_like(theirs), where=theirs > 0)
    shared = own * np.log2(own / middle) + theirs * np.log2(ratio) - theirs
    divergence = (1 + np.bincount(texts, shared, len(sizes))) / 2
    return np.where(sizes > 0, np.clip(divergence, 0, 1), np.nan)
