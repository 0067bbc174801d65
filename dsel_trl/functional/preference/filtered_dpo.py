"""filtered-DPO: drops pairs whose chosen answer the policy already surpasses (https://hf.co/papers/2404.13846)."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..ranking import Ids


def teaches(generated_rewards: ArrayLike, chosen_rewards: ArrayLike, threshold: float = 0.0) -> NDArray[np.bool_]:
    """
    Tells for which pairs the chosen answer is still better than what the policy writes.

    Args:
        generated_rewards (array-like of shape `(n,)`):
            Reward of one response sampled from the current policy per prompt.
        chosen_rewards (array-like of shape `(n,)`):
            Reward of the chosen answers.
        threshold (`float`, *optional*, defaults to `0.0`):
            A pair is kept if `generated - chosen < threshold`; equality and NaN are dropped.

    Returns:
        `np.ndarray` of bool, shape `(n,)`.
    """
    generated = np.asarray(generated_rewards, dtype=np.float64)
    chosen = np.asarray(chosen_rewards, dtype=np.float64)
    if generated.shape != chosen.shape:
        raise ValueError(f"{generated.size} generated rewards do not match {chosen.size} rewards of chosen answers")
    with np.errstate(invalid="ignore"):
        return np.asarray(generated - chosen < threshold)


def surviving_ids(ids: ArrayLike, kept: ArrayLike) -> Ids:
    """
    The ids that stay for the next epoch; all of them if none would, so that filtering ends instead of the run.

    Args:
        ids (array-like of int, shape `(m,)`):
            Ids that are still in the set.
        kept (array-like of bool, shape `(m,)`):
            From [`teaches`].

    Returns:
        `np.ndarray` of int64.
    """
    remaining = np.asarray(ids, dtype=np.int64)
    mask = np.asarray(kept, dtype=bool)
    return remaining[mask] if mask.any() else remaining
