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
