"""Selects k of a candidate batch of B scored rows, with any score (higher = train on it first)."""

import numpy as np
from numpy.typing import ArrayLike

from ..ranking import Ids, bottom_k, epsilon_mix, gumbel_top_k, rank_order, selectable, threshold, top_k

MODES = ("top_k", "bottom_k", "gumbel_top_k", "epsilon_mix", "threshold")


def at_or_above(scores: ArrayLike, quantile: float) -> Ids:
    """Positions of the scores that reach the [`~ranking.threshold`] at `quantile`, ascending; empty if none."""
    values = np.asarray(scores)
    # A NaN threshold (nothing selectable) is reached by nothing.
    return np.flatnonzero(selectable(values) & (values >= threshold(values, quantile)))


def select_k_of_b(
    scores: ArrayLike,
    k: int,
    mode: str = "top_k",
    *,
    temperature: float = 0.5,
    epsilon: float = 0.1,
    quantile: float = 0.5,
    fill: bool = False,
    rng: np.random.Generator | None = None,
) -> Ids:
    """
    Positions of the rows to train on.

    Args:
        scores (array-like of shape `(B,)`):
            One score per candidate row; a non-finite one is never chosen.
        k (`int`):
            Number of rows, clamped to [1, number of finite scores].
        mode (`str`, *optional*, defaults to `"top_k"`):
            `"top_k"`, `"bottom_k"`, `"gumbel_top_k"` (a draw from the softmax), `"epsilon_mix"` (best first with
            random slots) or `"threshold"` (all rows at or above a quantile; `k` has no effect).
        temperature (`float`, *optional*, defaults to `0.5`):
            Of `"gumbel_top_k"`.
        epsilon (`float`, *optional*, defaults to `0.1`):
            Of `"epsilon_mix"`.
        quantile (`float`, *optional*, defaults to `0.5`):
            Of `"threshold"`.
        fill (`bool`, *optional*, defaults to `False`):
            Whether to repeat rows, uniformly drawn from the finite ones, when fewer than `k` have a finite score.
        rng (`np.random.Generator`, *optional*):
            Needed where something is drawn.

    Returns:
        `np.ndarray` of int64: positions, best first; empty if no score is finite.

    Raises:
        `ValueError`: if `mode` is unknown, or `rng` is missing where it is needed.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, but is {mode!r}")
    valid = np.flatnonzero(selectable(scores))
    if mode == "threshold":
        return at_or_above(scores, quantile)
    if mode == "top_k":
        picked = top_k(scores, k)
    elif mode == "bottom_k":
        picked = bottom_k(scores, k)
    elif mode == "gumbel_top_k":
        picked = gumbel_top_k(scores, k, temperature, rng)
    else:
        picked = epsilon_mix(rank_order(scores)[: len(valid)], k, epsilon, rng)
    if not fill or len(picked) >= k or len(valid) == 0:
        return picked
    if rng is None:
        raise ValueError("fill=True draws at random: pass rng=numpy.random.default_rng(seed), got None")
    return np.concatenate([picked, rng.choice(valid, size=k - len(picked), replace=True)])
