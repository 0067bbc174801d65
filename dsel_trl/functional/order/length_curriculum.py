"""Which bucket comes next: odds, cycles and schedules of a sequence-length curriculum (hf.co/papers/2405.13226)."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

Ids = NDArray[np.int64]
Curriculum = str | Sequence[float]

SCHEDULES = ("odds", "subcycle")


class Uniform(Protocol):
    """Anything with a `random()` in [0, 1): a NumPy generator or a `random.Random`."""

    def random(self) -> float: ...


def curriculum_odds(curriculum: Curriculum, num_buckets: int) -> NDArray[np.float64]:
    """
    Odds of a batch from each bucket, from short to long (hf.co/papers/2405.13226, Table 3).

    Args:
        curriculum (`str` or `Sequence[float]`):
            `"uniform"`, `"grow_linear"`, `"grow_p2"`, `"grow_p100"`, `"shrink_p100"`, or the odds themselves.
        num_buckets (`int`):
            Number of buckets.

    Returns:
        `np.ndarray` of float64 of shape `(num_buckets,)`.

    Raises:
        `ValueError`: if the name is unknown, or the odds do not fit or are not positive.

    Example:

    ```python
    >>> from dsel_trl.functional.order.length_curriculum import curriculum_odds

    >>> curriculum_odds("grow_p2", 4).tolist()
    [8.0, 4.0, 2.0, 1.0]
    ```
    """
    down = np.arange(num_buckets - 1, -1, -1, dtype=np.float64)
    named = {
        "uniform": np.ones(num_buckets),
        "grow_linear": down + 1,
        "grow_p2": 2.0**down,
        "grow_p100": 100.0**down,
        "shrink_p100": 100.0 ** down[::-1],
    }
    if isinstance(curriculum, str):
        if curriculum not in named:
            raise ValueError(f"`curriculum` must be one of {', '.join(named)} or a list of odds, got {curriculum!r}")
        return named[curriculum]
    odds = np.asarray(curriculum, dtype=np.float64)
    if odds.shape != (num_buckets,) or not (odds > 0).all():
        raise ValueError(f"need {num_buckets} positive odds, one per bucket, got {list(curriculum)}")
    return odds


def cycle_counts(num_batches: ArrayLike, cycles: int, *, drop_remainder: bool = False) -> Ids:
    """
    Batches that each cycle takes from each bucket (hf.co/papers/2405.13226, section 3.4).

    Args:
        num_batches (`array` of int of shape `(K,)`):
            Batches in each bucket.
        cycles (`int`):
            Number of cycles.
        drop_remainder (`bool`, *optional*, defaults to `False`):
            Drop what does not divide evenly, as the published loader does, instead of giving it to the first cycles.

    Returns:
        `np.ndarray` of int64 of shape `(cycles, K)`.

    Raises:
        `ValueError`: if `cycles` is not positive or a count is negative.
    """
    counts = np.asarray(num_batches, dtype=np.int64)
    if cycles < 1:
        raise ValueError(f"`cycles` must be at least 1, got {cycles}")
    if (counts < 0).any():
        raise ValueError(f"numbers of batches must not be negative, got {counts.tolist()}")
    extra = np.arange(cycles)[:, None] < (0 if drop_remainder else counts % cycles)
    return counts // cycles + extra


def bucket_probabilities(num_batches: ArrayLike, odds: ArrayLike) -> NDArray[np.float64]:
    """
    Probability of each bucket at a step: proportional to its batches in this cycle times its odds.

    Args:
        num_batches (`array` of int of shape `(K,)`):
            Batches of each bucket in this cycle.
        odds (`array` of shape `(K,)`):
            Result of [`curriculum_odds`].

    Returns:
        `np.ndarray` of float64 of shape `(K,)`: all zero if there is no batch.
    """
    weights = np.asarray(num_batches, dtype=np.float64) * np.asarray(odds, dtype=np.float64)
    total = weights.sum()
    return weights / total if total > 0 else weights


def schedule_by_odds(num_batches: ArrayLike, odds: ArrayLike, rng: Uniform) -> Ids:
    """
    Draws the bucket of every step of a cycle; short buckets with large odds run out first, so the lengths grow.

    See hf.co/papers/2405.13226, section 3.4. An exhausted bucket is removed when it is drawn, and the draw is repeated
    with the other buckets' original probabilities.

    Args:
        num_batches (`array` of int of shape `(K,)`):
            Batches of each bucket in this cycle.
        odds (`array` of shape `(K,)`):
            Odds from short to long.
        rng (`np.random.Generator` or `random.Random`):
            One `random()` is used per draw, draws of an exhausted bucket included.

    Returns:
        `np.ndarray` of int64 of shape `(sum(num_batches),)`: position of the bucket at each step.
    """
    counts, chances = np.asarray(num_batches, dtype=np.int64), np.asarray(odds, dtype=np.float64)
    left = counts.tolist()
    active = [bucket for bucket, count in enumerate(left) if count > 0]
    steps = np.zeros(sum(left), dtype=np.int64)
    step = 0
    while active and step < len(steps):
        cumulative = np.cumsum(bucket_probabilities(counts[active], chances[active]))
        while True:
            drawn = min(int(np.searchsorted(cumulative, rng.random())), len(active) - 1)
            if left[active[drawn]] == 0:
                del active[drawn]
                break
            steps[step] = active[drawn]
            left[active[drawn]] -= 1
            step += 1
            if step == len(steps):
                break
    return steps


def subcycle_odds(curriculum: str, num_buckets: int) -> Ids:
    """
    Odds of the fixed-count construction: one sub-cycle per bucket, each with its own favourite bucket.

    Args:
        curriculum (`str`):
            `"grow_linear"` or `"grow_p2"`.
        num_buckets (`int`):
            Number of buckets, and of sub-cycles.

    Returns:
        `np.ndarray` of int64 of shape `(num_buckets, num_buckets)`: rows are buckets from short to long, columns
        sub-cycles.

    Raises:
        `ValueError`: if the curriculum has no such construction.
    """
    if curriculum not in ("grow_linear", "grow_p2"):
        raise ValueError(f'the sub-cycle construction needs "grow_linear" or "grow_p2", got {curriculum!r}')
    bucket, cycle = np.arange(num_buckets)[:, None], np.arange(num_buckets)[None]
    # A bucket's odds rise until its own sub-cycle and then fall towards 1 in the last one.
    power = num_buckets - np.where(cycle <= bucket, bucket - cycle, cycle)
    odds: Ids = 2 ** (power - 1) if curriculum == "grow_p2" else power
    return odds


def subcycle_counts(num_batches: ArrayLike, odds: ArrayLike, *, clip_surplus: bool = True) -> Ids:
    """
    Batches of each bucket in each sub-cycle, in proportion to the odds.

    Args:
        num_batches (`array` of int of shape `(K,)`):
            Batches of each bucket in this cycle.
        odds (`array` of shape `(K, K)`):
            Result of [`subcycle_odds`].
        clip_surplus (`bool`, *optional*, defaults to `True`):
            Take back, from the last sub-cycles, what rounding gave out too much. `False` repeats the published code,
            which then serves batches twice.

    Returns:
        `np.ndarray` of int64 of shape `(K, K)`: rows add up to `num_batches`.
    """
    totals = np.asarray(num_batches, dtype=np.int64)
    table = np.asarray(odds, dtype=np.float64)
    counts: Ids = np.rint(table / table.sum(axis=1, keepdims=True) * totals[:, None]).astype(np.int64)
    counts[:, -1] += np.maximum(totals - counts.sum(axis=1), 0)
    if clip_surplus:
        # Never hand out more than what the sub-cycles before have left over.
        before = np.cumsum(counts, axis=1) - counts
        counts = np.clip(totals[:, None] - before, 0, counts)
    return counts


def schedule_by_subcycles(counts: ArrayLike, rng: np.random.Generator, *, longest_first: bool = True) -> Ids:
    """
    Puts the sub-cycles one after another, each shuffled inside.

    Args:
        counts (`array` of int of shape `(K, S)`):
            Result of [`subcycle_counts`].
        rng (`np.random.Generator`):
            Source of randomness.
        longest_first (`bool`, *optional*, defaults to `True`):
            Swap a batch of the longest bucket to the front, so that a run that does not fit in memory fails at once.

    Returns:
        `np.ndarray` of int64: position of the bucket at each step.
    """
    table = np.asarray(counts, dtype=np.int64)
    buckets = np.arange(len(table))
    parts = [rng.permutation(np.repeat(buckets, column)) for column in table.T]
    steps = np.concatenate([np.zeros(0, dtype=np.int64), *parts])
    if longest_first and len(steps):
        longest = int(np.argmax(steps))
        steps[[0, longest]] = steps[[longest, 0]]
    return steps


def cycle_schedule(
    num_batches: ArrayLike, curriculum: Curriculum, rng: np.random.Generator, *, construction: str = "odds"
) -> Ids:
    """
    Bucket of every step of one cycle, in either construction.

    Args:
        num_batches (`array` of int of shape `(K,)`):
            Batches of each bucket in this cycle, from short to long.
        curriculum (`str` or `Sequence[float]`):
            See [`curriculum_odds`]; the sub-cycle construction needs a growing one by name.
        rng (`np.random.Generator`):
            Source of randomness.
        construction (`str`, *optional*, defaults to `"odds"`):
            `"odds"` ([`schedule_by_odds`]) or `"subcycle"` ([`schedule_by_subcycles`]).

    Returns:
        `np.ndarray` of int64 of shape `(sum(num_batches),)`.

    Raises:
        `ValueError`: if the construction or the curriculum is unknown.
    """
    num_buckets = len(np.asarray(num_batches))
    if construction == "odds":
        return schedule_by_odds(num_batches, curriculum_odds(curriculum, num_buckets), rng)
    if construction == "subcycle":
        odds = subcycle_odds(str(curriculum), num_buckets)
        return schedule_by_subcycles(subcycle_counts(num_batches, odds), rng)
    raise ValueError(f"`construction` must be one of {', '.join(SCHEDULES)}, got {construction!r}")
