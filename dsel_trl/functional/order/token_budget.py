"""Plans of batches that hold about the same number of padded tokens each."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

Ids = NDArray[np.int64]


def budget_starts(
    tokens: ArrayLike,
    budget: int,
    window: int,
    *,
    rows_per_example: int = 1,
    max_examples: int | None = None,
    ranks: int = 1,
) -> Ids:
    """
    Where the batches start when examples in order of [`sorted_windows`] are cut greedily.

    Args:
        tokens (`array` of int of shape `(N,)`):
            Tokens of every example in that order: falling inside each window.
        budget (`int`):
            Largest number of padded tokens in a batch of one rank.
        window (`int`):
            Examples per window; a batch ends with its window at the latest.
        rows_per_example (`int`, *optional*, defaults to `1`):
            Sequences per example.
        max_examples (`int`, *optional*):
            Largest number of examples in a batch of one rank.
        ranks (`int`, *optional*, defaults to `1`):
            Processes that a batch is shared by, in equal parts.

    Returns:
        `np.ndarray` of int64: positions, rising; the first is 0.
    """
    # The first of a batch is its longest, so its length alone says how many fit.
    fits = budget // (rows_per_example * np.maximum(np.asarray(tokens, dtype=np.int64), 1))
    return _batch_starts(ranks * np.clip(fits, 1, max_examples), window)


def sorted_windows(lengths: ArrayLike, permutation: ArrayLike, window: int) -> Ids:
    """
    Sorts each window of a permutation from long to short; equal lengths keep their random order.

    Args:
        lengths (`array` of shape `(N,)`):
            Tokens of every example.
        permutation (`array` of int of shape `(N,)`):
            Random order to start from.
        window (`int`):
            Examples that are sorted together.

    Returns:
        `np.ndarray` of int64 of shape `(N,)`.
    """
    order = np.asarray(permutation, dtype=np.int64).copy()
    keys = -np.asarray(lengths)[order].astype(np.int64)
    whole = len(order) - len(order) % window
    table, rest = order[:whole].reshape(-1, window), order[whole:]
    by_length = np.argsort(keys[:whole].reshape(-1, window), axis=1, kind="stable")
    table[:] = np.take_along_axis(table, by_length, axis=1)
    rest[:] = rest[np.argsort(keys[whole:], kind="stable")]
    return order


def _batch_starts(sizes: Ids, window: int) -> Ids:
    """Positions at which batches start; a batch ends with its window at the latest."""
    # Where one batch ends depends on where it began, so this walks from batch to batch, in all windows at once.
    starts = np.arange(0, len(sizes), window, dtype=np.int64)
    ends = np.minimum(starts + window, len(sizes))
    found = [starts]
    while len(starts):
        starts = starts + sizes[starts]
        inside = starts < ends
        starts, ends = starts[inside], ends[inside]
        found.append(starts)
    return np.sort(np.concatenate(found))
