"""Running statistics of a stream of batches: plain numbers that go into a checkpoint."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def batch_moments(values: Tensor) -> tuple[float, float]:
    """
    Mean and sample standard deviation (ddof 1) of the finite entries of a batch.

    Args:
        values (`torch.Tensor` of shape `(B,)`):
            The global batch, gathered from all ranks.

    Returns:
        `tuple[float, float]`: the deviation is NaN below two entries and exactly 0 for a constant batch; the mean is
        NaN without any finite entry.
    """
    finite = values.detach()
    finite = finite[torch.isfinite(finite)]
    if finite.numel() == 0:
        return float("nan"), float("nan")
    if finite.numel() == 1:
        return float(finite[0]), float("nan")
    # The computed deviation of equal values can be a rounding error; dividing by it would blow up.
    if bool(finite.max() == finite.min()):
        return float(finite[0]), 0.0
    finite = finite if finite.dtype == torch.float64 else finite.float()
    return float(finite.mean()), float(finite.std())


@dataclass(frozen=True)
class EmaMoments:
    """
    Exponential moving averages of the batch mean and the batch standard deviation.

    Args:
        mean (`float`, *optional*, defaults to `0.0`):
            Average of the batch means.
        std (`float`, *optional*, defaults to `0.0`):
            Average of the batch standard deviations (ddof 1); 0 while none could be measured.
        updates (`int`, *optional*, defaults to `0`):
            Number of batches seen.
    """

    mean: float = 0.0
    std: float = 0.0
    updates: int = 0


def ema_update(state: EmaMoments, values: Tensor, decay: float = 0.9, init: str = "first_batch") -> EmaMoments:
    """
    Takes one batch into the moving averages.

    Args:
        state (`EmaMoments`):
            State before the batch.
        values (`torch.Tensor` of shape `(B,)`):
            The global batch. Non-finite entries are left out; a batch of one updates the mean only.
        decay (`float`, *optional*, defaults to `0.9`):
            Share of the old value that is kept, in [0, 1).
        init (`str`, *optional*, defaults to `"first_batch"`):
            `"first_batch"` starts at the moments of the first batch, `"zero"` lets the averages grow from 0, which
            makes the first deviations far too small.

    Returns:
        `EmaMoments`: the state after the batch.

    Raises:
        `ValueError`: if `decay` is not in [0, 1) or `init` is unknown.
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay must be in [0, 1), but is {decay}")
    if init not in ("first_batch", "zero"):
        raise ValueError(f'init must be "first_batch" or "zero", but is {init!r}')
    mean, std = batch_moments(values)
    if np.isnan(mean):
        return state
    adopt = init == "first_batch"
    new_mean = mean if adopt and state.updates == 0 else decay * state.mean + (1 - decay) * mean
    new_std = state.std
    if not np.isnan(std):
        new_std = std if adopt and state.std == 0 else decay * state.std + (1 - decay) * std
    return EmaMoments(new_mean, new_std, state.updates + 1)


def add_to_means(means: np.ndarray, counts: np.ndarray, ids: np.ndarray, values: np.ndarray) -> np.ndarray:
    """
    Takes values of some ids into the running mean of each.

    Args:
        means (`np.ndarray` of shape `(N,)`):
            Mean per id so far; NaN where there is none. Not changed.
        counts (`np.ndarray` of shape `(N,)`):
            How many values each mean is of; raised in place.
        ids (`np.ndarray` of shape `(n,)`, int64):
            Whose the values are; an id may come several times.
        values (`np.ndarray` of shape `(n,)`):
            The values; those that are not finite are left out.

    Returns:
        `np.ndarray` of shape `(N,)`, float64: the means with them.
    """
    known = np.isfinite(values)
    totals = np.where(counts > 0, means, 0.0) * counts
    np.add.at(totals, ids[known], values[known].astype(np.float64))
    np.add.at(counts, ids[known], 1)
    result: np.ndarray = np.divide(totals, counts, out=np.full(len(means), np.nan), where=counts > 0)
    return result


@dataclass(frozen=True)
class Moments:
    """
    Mean and spread of all values of a stream, the older ones of which may weigh less.

    Args:
        count (`float`, *optional*, defaults to `0.0`):
            Values seen, as far as they still weigh.
        mean (`float`, *optional*, defaults to `0.0`):
            Their mean.
        squares (`float`, *optional*, defaults to `0.0`):
            Sum of their squared differences from it.
    """

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    def standardised(self, values: np.ndarray) -> np.ndarray:
        """`(value - mean) / deviation`, float64; zeros where the values seen do not differ."""
        deviation = np.sqrt(self.squares / self.count) if self.count else 0.0
        apart = np.asarray(values, dtype=np.float64) - self.mean
        # What is left of equal values is a rounding error of their mean.
        if deviation <= 1e-12 * abs(self.mean):
            return np.where(np.isfinite(apart), 0.0, np.nan)
        result: np.ndarray = apart / deviation
        return result


def moments_update(state: Moments, values: np.ndarray, memory: float = float("inf")) -> Moments:
    """
    Takes values into the moments of a stream; those that are not finite are left out.

    Args:
        state (`Moments`):
            Before them.
        values (`np.ndarray` of shape `(n,)`):
            The values.
        memory (`float`, *optional*, defaults to infinity):
            As how many values all those before weigh at the most.
    """
    values = np.asarray(values, dtype=np.float64)
    values = values[np.isfinite(values)]
    if not len(values):
        return state
    share = min(1.0, memory / state.count) if state.count else 0.0
    count, own = state.count * share, float(values.mean())
    total = count + len(values)
    apart = own - state.mean
    squares = state.squares * share + float(np.square(values - own).sum()) + apart**2 * count * len(values) / total
    return Moments(total, state.mean + apart * len(values) / total, squares)
