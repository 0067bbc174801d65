"""Perplexity bands: keep the low, middle or high part of the perplexity range (hf.co/papers/2309.04564)."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..ranking import bottom_k, keep_count, rank_order, selectable, top_k

BANDS = ("low", "mid", "high")


def perplexity(mean_nll: ArrayLike) -> NDArray[np.float64]:
    """
    Perplexity from the mean negative log-likelihood of the tokens.

    Args:
        mean_nll (`array` of shape `(N,)`):
            Mean token loss of every example, in nats.

    Returns:
        `np.ndarray` of float64 of shape `(N,)`: infinite where the exponential overflows.
    """
    with np.errstate(over="ignore"):
        return np.exp(np.asarray(mean_nll, dtype=np.float64))


def perplexity_band(values: ArrayLike, fraction: float, band: str = "mid") -> NDArray[np.int64]:
    """
    Selects a band of the perplexity range (hf.co/papers/2309.04564, section 3.1).

    Args:
        values (`array` of shape `(N,)`):
            Perplexity (or mean loss: the order is the same) of every example. Non-finite entries are not selectable.
        fraction (`float`):
            Fraction of the selectable examples to keep, in (0, 1]; at least one.
        band (`str`, *optional*, defaults to `"mid"`):
            `"low"`: the k smallest. `"high"`: the k largest. `"mid"`: the window of k in the middle of the ascending
            order, starting at `(n - k) // 2`.

    Returns:
        `np.ndarray` of int64: ids in ascending order; ties at the border go to the lower id.

    Raises:
        `ValueError`: if `band` is unknown or `fraction` is not in (0, 1].

    Example:

    ```python
    >>> from dsel_trl.functional.text.perplexity import perplexity_band

    >>> perplexity_band([5.0, 1.0, 3.0, 2.0], fraction=0.5).tolist()
    [2, 3]
    ```
    """
    if band not in BANDS:
        raise ValueError(f'`band` must be "low", "mid" or "high", got {band!r}')
    n_valid = int(np.count_nonzero(selectable(values)))
    k = keep_count(fraction, n_valid)
    if band == "low":
        ids = bottom_k(values, k)
    elif band == "high":
        ids = top_k(values, k)
    else:
        start = (n_valid - k) // 2
        ids = rank_order(values, descending=False)[start : start + k]
    return np.sort(ids)
