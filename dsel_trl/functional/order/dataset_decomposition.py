"""Dataset decomposition: documents and examples in buckets of power-of-two length (hf.co/papers/2405.13226)."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .length_curriculum import SCHEDULES, Curriculum, cycle_counts, cycle_schedule

Ids = NDArray[np.int64]
Rng = np.random.Generator | np.random.RandomState


class Pieces(NamedTuple):
    """Pieces of documents, by document and position. A piece of bucket k spans `2**k + 1` tokens from `start`."""

    document: Ids
    start: Ids
    bucket: Ids
    dropped_tail: Ids
    """Tokens at the end of every document that are too few for the shortest bucket."""


class BucketBatch(NamedTuple):
    """One batch of a plan: the cycle it belongs to, its bucket and its examples."""

    cycle: int
    bucket: int
    ids: Ids


def _check_buckets(min_log2: int, max_log2: int) -> None:
    if not 0 <= min_log2 <= max_log2 <= 40:
        raise ValueError(f"buckets need 0 <= min_log2 <= max_log2 <= 40, got {min_log2} and {max_log2}")


def split_probabilities(min_log2: int = 8, max_log2: int = 13) -> NDArray[np.float64]:
    """
    Probabilities with which an over-long document is cut into each bucket, from the longest to the shortest.

    They are proportional to `2**(max_log2 - k)`, which gives every bucket the same expected number of tokens. So the
    randomised split is neither uniform nor longest first.

    Args:
        min_log2 (`int`, *optional*, defaults to `8`), max_log2 (`int`, *optional*, defaults to `13`):
            Shortest and longest bucket.

    Returns:
        `np.ndarray` of float64 of shape `(max_log2 - min_log2 + 1,)`.

    Raises:
        `ValueError`: if the buckets are out of order.
    """
    _check_buckets(min_log2, max_log2)
    weights = 2.0 ** np.arange(max_log2 - min_log2 + 1)
    probabilities: NDArray[np.float64] = weights / weights.sum()
    return probabilities


def decompose(lengths: ArrayLike, *, min_log2: int = 8, max_log2: int = 13, rng: Rng | None = None) -> Pieces:
    """
    Cuts documents from the front into pieces of `2**k + 1` tokens (hf.co/papers/2405.13226, section 2).

    Each piece is as long as possible; what is left of a document when it is shorter than the shortest bucket is
    dropped. A piece trains on its first `2**k` tokens as input and its last `2**k` as target.

    Args:
        lengths (`array` of int of shape `(D,)`):
            Tokens of every document, end-of-text token included.
        min_log2 (`int`, *optional*, defaults to `8`), max_log2 (`int`, *optional*, defaults to `13`):
            Shortest and longest bucket.
        rng (`np.random.Generator` or `np.random.RandomState`, *optional*):
            If given, what is longer than the longest bucket allows is cut at random with [`split_probabilities`];
            otherwise it is cut into pieces of the longest bucket.

    Returns:
        `Pieces`.

    Raises:
        `ValueError`: if a length is negative or the buckets are out of order.

    Example:

    ```python
    >>> from dsel_trl.functional.order.dataset_decomposition import decompose

    >>> decompose([33], min_log2=2, max_log2=4).bucket.tolist()
    [4, 3, 2]
    ```
    """
    _check_buckets(min_log2, max_log2)
    tokens = np.asarray(lengths, dtype=np.int64)
    if tokens.ndim != 1 or (len(tokens) and tokens.min() < 0):
        raise ValueError("`lengths` must be a flat array of non-negative numbers")
    documents, starts, buckets = [], [], []
    position = np.zeros(len(tokens), dtype=np.int64)
    if rng is None:
        whole = tokens // (2**max_log2 + 1)
        owner = np.repeat(np.arange(len(tokens)), whole)
        rank = np.arange(len(owner)) - np.repeat(np.cumsum(whole) - whole, whole)
        documents.append(owner)
        starts.append(rank * (2**max_log2 + 1))
        buckets.append(np.full(len(owner), max_log2))
        position = whole * (2**max_log2 + 1)
    else:
        cumulative = np.cumsum(split_probabilities(min_log2, max_log2))
        cumulative /= cumulative[-1]
        # Only documents that exceed the longest bucket by a factor of two are "longer": floor(log2) must be above it.
        while len(active := np.flatnonzero(tokens - position > 2 ** (max_log2 + 1))):
            drawn = max_log2 - np.searchsorted(cumulative, rng.random(len(active)), side="right")
            documents.append(active)
            starts.append(position[active])
            buckets.append(drawn)
            position[active] += 2**drawn + 1
    for bucket in range(max_log2, min_log2 - 1, -1):
        fits = np.flatnonzero(tokens - position >= 2**bucket + 1)
        documents.append(fits)
        starts.append(position[fits])
        buckets.append(np.full(len(fits), bucket))
        position[fits] += 2**bucket + 1
    document, start, bucket_of = (np.concatenate(part).astype(np.int64) for part in (documents, starts, buckets))
    order = np.lexsort((start, document))
    return Pieces(document[order], start[order], bucket_of[order], tokens - position)


def bucket_of_length(lengths: ArrayLike, *, min_log2: int = 8, max_log2: int = 13) -> Ids:
    """
    Bucket of examples that cannot be cut: the smallest k with `2**k >= length`, within the given buckets.

    This is the package's adaptation to prompt-completion data and preference pairs. Use the longer of the two
    sequences of a pair as its length, as they are padded together.

    Args:
        lengths (`array` of int of shape `(N,)`):
            Tokens of every example. One longer than `2**max_log2` gets the last bucket: truncate or drop it.
        min_log2 (`int`, *optional*, defaults to `8`), max_log2 (`int`, *optional*, defaults to `13`):
            Shortest and longest bucket.

    Returns:
        `np.ndarray` of int64 of shape `(N,)`.

    Raises:
        `ValueError`: if the buckets are out of order.
    """
    _check_buckets(min_log2, max_log2)
    # frexp is the bit length of an integer, exactly, where log2 would round.
    exponent = np.frexp(np.maximum(np.asarray(lengths, dtype=np.float64) - 1, 0))[1]
    return np.clip(exponent, min_log2, max_log2).astype(np.int64)


def even_buckets(buckets: ArrayLike, lengths: ArrayLike, multiple: int) -> Ids:
    """
    Moves the fewest examples to longer buckets that make every bucket but the shortest a multiple of a number.

    So no step of a bucket has fewer examples than there are micro-batches to share them. The longest examples of a
    bucket are the ones that move: they are padded least.

    Args:
        buckets (`array` of int of shape `(N,)`):
            Bucket of every example.
        lengths (`array` of int of shape `(N,)`):
            Tokens of every example.
        multiple (`int`):
            Examples that a step must be able to share out over its micro-batches.

    Returns:
        `np.ndarray` of int64 of shape `(N,)`: no bucket is shorter than before.

    Example:

    ```python
    >>> from dsel_trl.functional.order.dataset_decomposition import even_buckets

    >>> even_buckets([3, 2, 2, 2, 1], [8, 4, 3, 4, 2], multiple=2).tolist()
    [3, 3, 2, 2, 1]
    ```
    """
    old, tokens = np.asarray(buckets, dtype=np.int64), np.asarray(lengths)
    order = np.lexsort((-tokens.astype(np.int64), -old))
    kinds, counts = np.unique(-old, return_counts=True)
    ends = -(-np.cumsum(counts) // multiple) * multiple
    new = np.empty_like(old)
    new[order] = -kinds[np.searchsorted(ends, np.arange(len(old)), side="right")]
    return new


def bucket_batch_size(bucket: ArrayLike, tokens: int, *, rows_per_example: int = 1) -> Ids:
    """
    Examples per batch of a bucket, so that every step has the same number of tokens (hf.co/papers/2405.13226, 2.2).

    Args:
        bucket (`int` or `array` of int):
            Bucket(s).
        tokens (`int`):
            Token budget of a step.
        rows_per_example (`int`, *optional*, defaults to `1`):
            Sequences per example; 2 for a preference pair.

    Returns:
        `np.ndarray` of int64: at least 1.

    Raises:
        `ValueError`: if a size is not positive.
    """
    if tokens < 1 or rows_per_example < 1:
        raise ValueError(f"`tokens` and `rows_per_example` must be at least 1, got {tokens} and {rows_per_example}")
    return np.maximum(1, tokens // (2 ** np.asarray(bucket, dtype=np.int64) * rows_per_example))


def decomposition_plan(
    buckets: ArrayLike,
    tokens: int,
    *,
    seed: int | Sequence[int],
    curriculum: Curriculum = "grow_p2",
    cycles: int = 8,
    rows_per_example: int = 1,
    drop_last: bool = False,
    construction: str = "odds",
) -> list[BucketBatch]:
    """
    Batches of one bucket each, in the order of a length curriculum (hf.co/papers/2405.13226, section 3.4).

    Args:
        buckets (`array` of int of shape `(N,)`):
            Bucket of every example or piece, from [`bucket_of_length`] or [`decompose`].
        tokens (`int`):
            Token budget of a step.
        seed (`int` or `Sequence[int]`):
            Seed of the shuffles and of the draws; every cycle has its own stream.
        curriculum (`str` or `Sequence[float]`, *optional*, defaults to `"grow_p2"`):
            Name, or odds per bucket from short to long.
        cycles (`int`, *optional*, defaults to `8`):
            How often the curriculum is run through.
        rows_per_example (`int`, *optional*, defaults to `1`):
            Sequences per example; 2 for a preference pair.
        drop_last (`bool`, *optional*, defaults to `False`):
            Whether to drop the last, smaller batch of a bucket.
        construction (`str`, *optional*, defaults to `"odds"`):
            `"odds"` draws a bucket per step, `"subcycle"` has fixed counts per part of a cycle.

    Returns:
        `list[BucketBatch]`: every example is in at most one batch, and in exactly one unless `drop_last`.

    Raises:
        `ValueError`: if a parameter is out of range.
    """
    if construction not in SCHEDULES:
        raise ValueError(f"`construction` must be one of {', '.join(SCHEDULES)}, got {construction!r}")
    kinds, members = np.unique(np.asarray(buckets, dtype=np.int64), return_inverse=True)
    rng = np.random.default_rng([*np.atleast_1d(seed).tolist(), 0])
    shuffled = rng.permutation(len(members))
    grouped = shuffled[np.argsort(members[shuffled], kind="stable")]
    counts = np.bincount(members, minlength=len(kinds))
    sizes = bucket_batch_size(kinds, tokens, rows_per_example=rows_per_example)
    num_batches = counts // sizes if drop_last else -(-counts // sizes)
    first, taken = np.cumsum(counts) - counts, np.zeros(len(kinds), dtype=np.int64)
    plan = []
    for cycle, available in enumerate(cycle_counts(num_batches, cycles)):
        stream = np.random.default_rng([*np.atleast_1d(seed).tolist(), cycle + 1])
        for kind in cycle_schedule(available, curriculum, stream, construction=construction):
            start = first[kind] + taken[kind] * sizes[kind]
            stop = min(start + sizes[kind], first[kind] + counts[kind])
            plan.append(BucketBatch(cycle, int(kinds[kind]), grouped[start:stop]))
            taken[kind] += 1
    return plan
