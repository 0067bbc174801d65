"""Plans of batches that hold about the same number of padded tokens each."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

Ids = NDArray[np.int64]


def token_budget_batches(
    lengths: ArrayLike,
    budget: int,
    rng: np.random.Generator,
    *,
    window: int = 4096,
    rows_per_example: int = 1,
    max_examples: int | None = None,
) -> list[Ids]:
    """
    Cuts the data into batches of similar length and bounded padded size, in random order.

    The examples are shuffled, cut into windows, sorted by length inside each window and cut greedily into batches,
    which are shuffled. A larger window pads less, a smaller one is more random.

    Args:
        lengths (`array` of int of shape `(N,)`):
            Tokens of every example; for preference pairs the longer of the two sequences.
        budget (`int`):
            Largest number of padded tokens in a batch: examples times `rows_per_example` times the longest length. An
            example that exceeds it alone gets a batch of its own.
        rng (`np.random.Generator`):
            Source of randomness; it is advanced.
        window (`int`, *optional*, defaults to `4096`):
            Examples that are sorted together.
        rows_per_example (`int`, *optional*, defaults to `1`):
            Sequences per example; 2 for preference pairs.
        max_examples (`int`, *optional*):
            Largest number of examples in a batch.

    Returns:
        `list[np.ndarray]`: ids (int64) of each batch, longest first; every id is in exactly one batch.

    Raises:
        `ValueError`: if a length is negative or a size is not positive.

    Example:

    ```python
    >>> import numpy as np
    >>> from dsel_trl.functional.order.token_budget import token_budget_batches

    >>> batches = token_budget_batches([10, 3, 9, 2, 2], budget=20, rng=np.random.default_rng(0))
    >>> sorted(sorted(batch.tolist()) for batch in batches)
    [[0, 2], [1, 3, 4]]
    ```
    """
    tokens = np.asarray(lengths)
    if tokens.ndim != 1 or (len(tokens) and tokens.min() < 0):
        raise ValueError("`lengths` must be a flat array of non-negative numbers")
    if min(budget, window, rows_per_example) < 1:
        raise ValueError(f"all sizes must be positive, got {budget=}, {window=}, {rows_per_example=}")
    if max_examples is not None and max_examples < 1:
        raise ValueError(f"`max_examples` must be at least 1, got {max_examples}")
    order = sorted_windows(tokens, rng.permutation(len(tokens)), window)
    starts = budget_starts(tokens[order], budget, window, rows_per_example=rows_per_example, max_examples=max_examples)
    bounds = np.append(starts, len(order)).tolist()
    return [order[bounds[i] : bounds[i + 1]] for i in rng.permutation(len(starts)).tolist()]


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


def padded_tokens(batches: list[Ids], lengths: ArrayLike, *, rows_per_example: int = 1) -> Ids:
    """
    Padded tokens of every batch.

    Args:
        batches (`list[np.ndarray]`):
            Ids of each batch.
        lengths (`array` of int of shape `(N,)`):
            Tokens of every example.
        rows_per_example (`int`, *optional*, defaults to `1`):
            Sequences per example.

    Returns:
        `np.ndarray` of int64 of shape `(len(batches),)`.
    """
    if not batches:
        return np.zeros(0, dtype=np.int64)
    counts = np.fromiter(map(len, batches), dtype=np.int64, count=len(batches))
    flat = np.asarray(lengths, dtype=np.int64)[np.concatenate(batches)]
    return counts * rows_per_example * np.maximum.reduceat(flat, np.cumsum(counts) - counts)


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
