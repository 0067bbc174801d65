"""Sharing a budget out over groups of unequal size."""

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray


def water_fill(sizes: ArrayLike, budget: int, *, trim: bool = True) -> NDArray[np.int64]:
    """
    Gives every group the same share of a budget; what a small group cannot use goes to the larger ones.

    Groups are visited by increasing size (hf.co/papers/2410.10636, section 3.3): one below the present share gives all
    it has, and the share of those left grows.

    Args:
        sizes (`array` of int of shape `(K,)`):
            Examples of each group.
        budget (`int`):
            Examples wanted in all, at least 0; more than there are means all of them.
        trim (`bool`, *optional*, defaults to `True`):
            Whether what rounding up gives too much is taken back, one by one, from the largest shares (of equal ones,
            the last). The published code does not.

    Returns:
        `np.ndarray` of int64 of shape `(K,)`: examples to take of each group, never more than it has; with `trim`
        they add up to the budget.

    Raises:
        `ValueError`: if a size or the budget is negative.

    Example:

    ```python
    >>> water_fill([2, 10, 30], 18).tolist()
    [2, 8, 8]
    ```
    """
    counts = np.asarray(sizes, dtype=np.int64)
    if budget < 0 or (counts < 0).any():
        raise ValueError(f"a budget of {budget} for groups of {counts.tolist()}: neither can be negative")
    wanted = min(int(budget), int(counts.sum()))
    shares = np.zeros(len(counts), dtype=np.int64)
    if not wanted:
        return shares
    filled = counts > 0
    order = [group for group in np.argsort(counts, kind="stable").tolist() if filled[group]]
    quota = math.ceil(wanted / len(order))
    for place, group in enumerate(order):
        left = len(order) - place - 1
        shares[group] = min(counts[group], quota)
        if counts[group] < quota and left:
            quota += math.ceil((quota - counts[group]) / left)
    while trim and shares.sum() > wanted:
        shares[len(shares) - 1 - int(np.argmax(shares[::-1]))] -= 1
    return shares
