"""SelectiveDPO: trains on pairs that a model which never saw them finds easy (https://hf.co/papers/2502.09650)."""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..ranking import Ids, rank_order


class HalfSplit(NamedTuple):
    """Cross-fitting halves of one seed: each helper model scores the half that it is not trained on."""

    permutation: Ids
    first_eval: Ids
    first_train: Ids
    second_eval: Ids
    second_train: Ids


def half_split(n: int, seed: int) -> HalfSplit:
    """
    Splits `n` examples into two halves for two helper models (the paper uses the seeds 41, 42 and 43).

    Args:
        n (`int`):
            Number of examples.
        seed (`int`):
            Seed of the permutation, that of `numpy.random.seed(seed); numpy.random.permutation(n)`.

    Returns:
        `HalfSplit` of int64 arrays. With odd `n` the second half has one example more.
    """
    # The published splits come from numpy's legacy generator; an own instance leaves the global one alone.
    permutation = np.random.RandomState(seed).permutation(n).astype(np.int64)
    first, second = permutation[: n // 2], permutation[n // 2 :]
    return HalfSplit(permutation, first, second, second, first)


def stable_id(first_user_message: str) -> str:
    """Identity of an example in a dataset without an id column: the sha256 of its first user message."""
    return hashlib.sha256(first_user_message.encode("utf-8")).hexdigest()


def values_by_id(row_ids: Sequence[str], table_ids: Sequence[str], values: ArrayLike) -> NDArray[np.float64]:
    """
    Looks up each row of a training set in a table by id.

    Args:
        row_ids (sequence of `str`):
            Id of every training row; a repeated id finds the same entry each time.
        table_ids (sequence of `str`), values (array-like of shape `(m,)`):
            The table. Of entries that repeat an id the first counts.

    Returns:
        `np.ndarray` of float64, one value per training row; NaN where the table has no entry.
    """
    first: dict[str, float] = {}
    for key, value in zip(table_ids, np.asarray(values, dtype=np.float64).tolist(), strict=True):
        first.setdefault(key, value)
    return np.array([first.get(key, np.nan) for key in row_ids], dtype=np.float64)


def mean_validation_loss(losses: ArrayLike) -> NDArray[np.float64]:
    """
    Difficulty of each example: the mean of its validation losses over helper models and checkpoints.

    Args:
        losses (array-like of shape `(tables, n)`):
            One row per helper model and checkpoint; NaN where an example was not evaluated.

    Returns:
        `np.ndarray` of shape `(n,)` (higher = harder); NaN without any loss. An infinite loss makes the difficulty
        infinite: the losses of other checkpoints cannot make such a pair easy.
    """
    values = np.asarray(losses)
    known = ~np.isnan(values)
    total = np.where(known, values, 0.0).sum(axis=0)
    return np.where(known.any(axis=0), total / np.maximum(known.sum(axis=0), 1), np.nan)


def learned_step(margins: ArrayLike, delta: float = 0.4) -> NDArray[np.int64]:
    """
    Learned step: the first checkpoint from which on the implicit margin stays above `delta` (an analysis tool).

    Args:
        margins (array-like of shape `(n, T)`):
            Implicit margin of each pair at each checkpoint. NaN counts as not learned.
        delta (`float`, *optional*, defaults to `0.4`):
            Threshold; a margin equal to it is not above it.

    Returns:
        `np.ndarray` of int64, shape `(n,)`: 0 if it was always above, T if it never stayed. Higher = harder.

    Raises:
        `ValueError`: if `margins` is not two-dimensional.
    """
    values = np.asarray(margins, dtype=np.float64)
    if values.ndim != 2:
        raise ValueError(f"margins must have shape (examples, checkpoints), but have shape {values.shape}")
    failed = ~(values > delta)
    steps = values.shape[1]
    last_failure = steps - 1 - failed[:, ::-1].argmax(axis=1) if steps else np.zeros(len(values), dtype=np.int64)
    return np.where(failed.any(axis=1), last_failure + 1, 0).astype(np.int64)


def pool_fraction(progress: float, keep: float = 0.5, start: float = 0.1, full_at: float = 0.8) -> float:
    """
    Linear pacing: the share of the data, easiest first, that may be drawn at a point of the run.

    Args:
        progress (`float`):
            Share of the run that is done, in [0, 1].
        keep (`float`, *optional*, defaults to `0.5`):
            Share at the end.
        start (`float`, *optional*, defaults to `0.1`):
            Share at the beginning.
        full_at (`float`, *optional*, defaults to `0.8`):
            Progress from which the share is `keep`.

    Returns:
        `float`.

    Raises:
        `ValueError`: if `full_at` is not positive.
    """
    if not full_at > 0:
        raise ValueError(f"full_at must be positive, but is {full_at}")
    return start + (keep - start) * min(1.0, max(progress, 0.0) / full_at)


def rank_in_length_buckets(difficulty: ArrayLike, lengths: ArrayLike, n_buckets: int = 10) -> NDArray[np.float64]:
    """
    Rank fraction of each example among examples of similar length, so that easy does not simply mean short.

    Args:
        difficulty (array-like of shape `(n,)`):
            Difficulty; NaN = unknown.
        lengths (array-like of shape `(n,)`):
            Token counts. The examples sorted by length are cut into buckets of equal size.
        n_buckets (`int`, *optional*, defaults to `10`):
            Number of buckets.

    Returns:
        `np.ndarray` of float64, shape `(n,)`: 0 for the easiest of a bucket, below 1 for the hardest; NaN where
        unknown.

    Raises:
        `ValueError`: if `n_buckets` is below 1.
    """
    if n_buckets < 1:
        raise ValueError(f"n_buckets must be at least 1, but is {n_buckets}")
    values = np.asarray(difficulty, dtype=np.float64)
    ranks = np.full(len(values), np.nan)
    known = np.flatnonzero(np.isfinite(values))
    by_length = known[np.argsort(np.asarray(lengths)[known], kind="stable")]
    for members in np.array_split(by_length, n_buckets):
        members = np.sort(members)  # so that ties go to the lower id, not to the shorter example
        ranks[members[rank_order(values[members], descending=False)]] = np.arange(len(members)) / max(len(members), 1)
    return ranks
