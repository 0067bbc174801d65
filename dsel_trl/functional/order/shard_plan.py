"""How many whole shards of each length bucket make up a training of a given size (hf.co/papers/2405.13226)."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Ids = NDArray[np.int64]


class ShardPlan(NamedTuple):
    """How much of each bucket to train on per cycle."""

    sequences: Ids
    """Sequences per bucket and cycle."""
    weights: NDArray[np.float64]
    """Sampling weights per bucket: its share of the tokens times its odds."""
    tokens_per_cycle: int
    total_tokens: int
    exact: bool
    """Whether the requested number of tokens is met exactly."""


def plan_shards(
    total_tokens: int,
    cycles: int,
    *,
    num_shards: ArrayLike,
    sequences_per_shard: ArrayLike,
    sequence_lengths: ArrayLike,
    batch_multipliers: ArrayLike,
    odds: ArrayLike,
    num_processes: int = 1,
    num_workers: int = 1,
    global_batch: int = 1,
) -> ShardPlan:
    """
    Rounds the natural mixture of the buckets to whole shards on every process.

    Starting from the nearest whole numbers, single units are added or removed, first from the bucket of the longest
    sequences, until the total matches or every bucket has been tried.

    Args:
        total_tokens (`int`):
            Tokens to train on, over all cycles; may exceed what is there, as data may repeat.
        cycles (`int`):
            Number of cycles.
        num_shards (`array` of int of shape `(K,)`):
            Shards of each bucket, from short to long.
        sequences_per_shard (`array` of int of shape `(K,)`):
            Sequences in a shard of each bucket.
        sequence_lengths (`array` of int of shape `(K,)`):
            Tokens per sequence of each bucket.
        batch_multipliers (`array` of shape `(K,)`):
            Batch size of each bucket relative to the longest one.
        odds (`array` of shape `(K,)`):
            Odds of each bucket, for example from `curriculum_odds`.
        num_processes (`int`, *optional*, defaults to `1`):
            Processes that read shards.
        num_workers (`int`, *optional*, defaults to `1`):
            Loader workers per process.
        global_batch (`int`, *optional*, defaults to `1`):
            Sequences per step of the longest bucket.

    Returns:
        `ShardPlan`.

    Raises:
        `ValueError`: if the arrays differ in length, a size is not positive, or a batch is larger than a round of
            shards.

    Example:

    ```python
    >>> from dsel_trl.functional.order.shard_plan import plan_shards

    >>> plan_shards(
    ...     256,
    ...     cycles=2,
    ...     num_shards=[10, 10],
    ...     sequences_per_shard=[8, 4],
    ...     sequence_lengths=[4, 8],
    ...     batch_multipliers=[2, 1],
    ...     odds=[2, 1],
    ... ).sequences.tolist()
    [16, 8]
    ```
    """
    shards, per_shard, lengths = (
        np.asarray(part, dtype=np.int64) for part in (num_shards, sequences_per_shard, sequence_lengths)
    )
    multipliers, chances = np.asarray(batch_multipliers, dtype=np.float64), np.asarray(odds, dtype=np.float64)
    if len({part.shape for part in (shards, per_shard, lengths, multipliers, chances)}) > 1 or shards.ndim != 1:
        raise ValueError("all arrays must have one entry per bucket")
    if min(total_tokens, cycles, num_processes, num_workers, global_batch) < 1:
        raise ValueError("`total_tokens`, `cycles`, `num_processes`, `num_workers`, `global_batch` must be positive")
    unit = per_shard * num_processes * num_workers
    batch = multipliers * global_batch * num_workers
    if not (unit > batch).all():
        bucket = int(np.flatnonzero(unit <= batch)[0])
        raise ValueError(
            f"bucket {bucket}: one shard per process holds {unit[bucket]} sequences, a batch needs more than that "
            f"({batch[bucket]:g}); use larger shards or a smaller batch"
        )
    available = shards * per_shard * lengths
    needed = total_tokens / available.sum() * available / cycles / lengths
    units = np.rint(needed / unit).astype(np.int64)
    unit_tokens = unit * lengths
    target = total_tokens / cycles
    tried: set[tuple[int, ...]] = set()
    bucket = len(units) - 1
    while (missing := target - int((units * unit_tokens).sum())) != 0:
        if bucket < 0:
            break
        state = tuple(units.tolist())
        if state in tried:
            bucket -= 1
        tried.add(state)
        # Index -1 after the last bucket still moves the longest one: the published planner ends on that step.
        units[bucket] += 1 if missing > 0 else -1
    tokens = units * unit_tokens
    # An empty first bucket cannot be the yardstick; the published planner divides by zero there.
    relative = tokens / tokens[0] * units[0] if tokens[0] else tokens / unit_tokens[0]
    weights = relative * chances
    per_cycle = int(tokens.sum())
    return ShardPlan(units * unit, weights, per_cycle, per_cycle * cycles, per_cycle * cycles == total_tokens)
