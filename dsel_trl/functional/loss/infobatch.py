"""InfoBatch: drop a random part of the well-learned examples and scale the rest up (hf.co/papers/2303.04947)."""

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

Rng = np.random.Generator | np.random.RandomState

INITIAL_SCORE = 3.0
"""Score of an example that was never trained on. All equal, so the first epoch prunes nothing."""

MIN_KEEP_RATIO = 0.1
"""The published code never keeps less than a tenth of the well-learned group, whatever `prune_ratio` says."""


def well_learned(scores: ArrayLike, *, as_published: bool = False) -> tuple[float, NDArray[np.bool_]]:
    """
    Finds the examples whose last known loss is strictly below the mean (hf.co/papers/2303.04947, Eq. 2).

    Args:
        scores (`array` of shape `(N,)`):
            Last known loss of every example, in nats. Non-finite entries count as unknown: they do not enter the mean
            and are never well learned.
        as_published (`bool`, *optional*, defaults to `False`):
            Take the mean in float32 as the published code does. It may round up, and then even scores that are all
            equal lie below it.

    Returns:
        `tuple[float, np.ndarray]`: the mean, and a boolean mask of shape `(N,)`.

    Raises:
        `ValueError`: if `scores` is not one-dimensional.

    Example:

    ```python
    >>> from dsel_trl.functional.loss.infobatch import well_learned

    >>> mean, mask = well_learned([1.0, 2.0, 6.0])
    >>> mean, mask.tolist()
    (3.0, [True, True, False])
    ```
    """
    values = np.asarray(scores, dtype=np.float32)
    if values.ndim != 1:
        raise ValueError(f"`scores` must be one-dimensional, got shape {values.shape}")
    known = np.isfinite(values)
    if not known.any():
        return float("nan"), np.zeros(len(values), dtype=np.bool_)
    if as_published:
        mean = np.float32(torch.from_numpy(values[known]).mean().item())
    else:
        # Summing float32 values in float64 is exact at any realistic size: equal scores are never below their mean.
        mean = np.float32(values[known].mean(dtype=np.float64))
    return float(mean), known & (values < mean)


def kept_share(prune_ratio: float) -> float:
    """
    Share of the well-learned examples that an epoch keeps: `1 - prune_ratio`, but never less than a tenth.

    Args:
        prune_ratio (`float`):
            Fraction of the well-learned examples to drop.

    Returns:
        `float` in [0.1, 1].

    Raises:
        `ValueError`: if `prune_ratio` is outside `[0, 1]`.
    """
    if not 0.0 <= prune_ratio <= 1.0:
        raise ValueError(f"`prune_ratio` must lie in [0, 1], got {prune_ratio}")
    return max(MIN_KEEP_RATIO, 1.0 - prune_ratio)


def infobatch_prune(
    scores: ArrayLike,
    rng: Rng,
    *,
    prune_ratio: float = 0.5,
    exact_weight: bool = False,
    min_keep: int = 0,
    candidates: ArrayLike | None = None,
    as_published: bool = False,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """
    Draws the examples and weights of one pruned epoch (hf.co/papers/2303.04947, section 3.2).

    Of the examples below the mean loss, a random `1 - prune_ratio` is kept and weighted up, so the expected gradient
    of the epoch is that of the full data. Everything else is kept with weight 1.

    Args:
        scores (`array` of shape `(N,)`):
            Last known loss of every example, in nats. Non-finite entries are kept with weight 1.
        rng (`np.random.Generator` or `np.random.RandomState`):
            Source of randomness; it is advanced.
        prune_ratio (`float`, *optional*, defaults to `0.5`):
            Fraction of the well-learned examples to drop. The kept fraction is clamped to `[0.1, 1]`.
        exact_weight (`bool`, *optional*, defaults to `False`):
            Weigh the survivors by `n_below / n_kept` instead of `1 / (1 - prune_ratio)`, which removes the bias that
            comes from rounding the number of survivors down.
        min_keep (`int`, *optional*, defaults to `0`):
            Keep at least this many well-learned examples. With `0`, a very small group can vanish for an epoch.
        candidates (`array` of int, *optional*):
            Decide on these ids only; well learned still means below the mean of all.
        as_published (`bool`, *optional*, defaults to `False`):
            See [`well_learned`].

    Returns:
        `tuple[np.ndarray, np.ndarray]`: kept ids in shuffled order, int64 of shape `(M,)`; weights of all examples,
        float32 of shape `(N,)`, 1 for those that are not survivors of the well-learned group.

    Raises:
        `ValueError`: if `prune_ratio` is outside `[0, 1]` or `min_keep` is negative.

    Example:

    ```python
    >>> import numpy as np
    >>> from dsel_trl.functional.loss.infobatch import infobatch_prune

    >>> ids, weights = infobatch_prune([0.1, 0.2, 0.3, 5.0], np.random.default_rng(0), prune_ratio=0.6)
    >>> len(ids), float(weights.max())
    (2, 2.5)
    ```
    """
    keep_ratio = kept_share(prune_ratio)
    if min_keep < 0:
        raise ValueError(f"`min_keep` must not be negative, got {min_keep}")
    _, mask = well_learned(scores, as_published=as_published)
    asked = np.arange(len(mask)) if candidates is None else np.sort(np.asarray(candidates, dtype=np.int64))
    below = asked[mask[asked]]
    n_keep = min(len(below), max(min_keep, int(keep_ratio * len(below))))
    survivors = rng.choice(below, n_keep, replace=False)
    weights = np.ones(len(mask), dtype=np.float32)
    if n_keep:
        weights[survivors] = len(below) / n_keep if exact_weight else 1.0 / keep_ratio
    ids = np.concatenate([asked[~mask[asked]], survivors]).astype(np.int64)
    rng.shuffle(ids)
    return ids, weights


def is_pruned_epoch(epoch: int, num_epochs: float, delta: float = 0.875) -> bool:
    """
    Tells whether an epoch is pruned; the last `1 - delta` of training sees all data (hf.co/papers/2303.04947, 3.3).

    Args:
        epoch (`int`):
            Epoch, counted from 0.
        num_epochs (`float`):
            Planned number of epochs.
        delta (`float`, *optional*, defaults to `0.875`):
            Fraction of the epochs in which examples are pruned.

    Returns:
        `bool`: whether `epoch + 1 <= delta * num_epochs`.

    Raises:
        `ValueError`: if `delta` is outside `[0, 1]`.
    """
    if not 0.0 <= delta <= 1.0:
        raise ValueError(f"`delta` must lie in [0, 1], got {delta}")
    # 0.29 * 100 is 28.999999999999996 in floating point: without the slack epoch 28 would be lost.
    return epoch + 1 <= delta * num_epochs + 1e-9


def infobatch_epoch(
    scores: ArrayLike,
    rng: Rng,
    *,
    pruned: bool,
    prune_ratio: float = 0.5,
    exact_weight: bool = False,
    min_keep: int = 0,
    candidates: ArrayLike | None = None,
    as_published: bool = False,
    stale_weights: ArrayLike | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """
    Draws the examples and weights of any epoch: pruned at first, all data with weight 1 at the end.

    Args:
        scores (`array` of shape `(N,)`):
            Last known loss of every example, in nats.
        rng (`np.random.Generator` or `np.random.RandomState`):
            Source of randomness; it is advanced.
        pruned (`bool`):
            Whether the epoch is pruned ([`is_pruned_epoch`]).
        prune_ratio (`float`, *optional*, defaults to `0.5`):
            Fraction of the well-learned examples to drop in a pruned epoch.
        exact_weight (`bool`, *optional*, defaults to `False`), min_keep (`int`, *optional*, defaults to `0`),
        candidates (`array` of int, *optional*), as_published (`bool`, *optional*, defaults to `False`):
            See [`infobatch_prune`].
        stale_weights (`array` of shape `(N,)`, *optional*):
            Weights that an epoch of all data has instead of 1. The published code forgets to reset those of the last
            pruned epoch when `delta * num_epochs` is not an integer.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: ids in training order, int64 of shape `(M,)`; weights of all examples, float32
        of shape `(N,)`.

    Raises:
        `ValueError`: if a parameter is out of range.
    """
    if pruned:
        return infobatch_prune(
            scores,
            rng,
            prune_ratio=prune_ratio,
            exact_weight=exact_weight,
            min_keep=min_keep,
            candidates=candidates,
            as_published=as_published,
        )
    size = len(np.asarray(scores))
    ids = np.arange(size, dtype=np.int64) if candidates is None else np.array(candidates, dtype=np.int64)
    rng.shuffle(ids)
    return ids, np.ones(size, dtype=np.float32) if stale_weights is None else np.array(stale_weights, dtype=np.float32)
