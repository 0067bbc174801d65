"""Alignment potential: pairs with a large target margin that the model does not have yet (https://hf.co/papers/2503.01864)."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..ranking import zscore

Moments = tuple[float, float]


def margin_moments(margin: ArrayLike) -> Moments:
    """
    Mean and deviation of the absolute margins of a dataset, by which those of a part of it become z-scores.

    Args:
        margin (array-like of shape `(n,)`):
            Margins; those that are not finite do not count.

    Returns:
        `tuple[float, float]`: mean and population deviation; `(0.0, 0.0)` where no margin is known.
    """
    values = np.abs(np.asarray(margin, dtype=np.float64))
    values = values[np.isfinite(values)]
    return (float(values.mean()), float(values.std())) if len(values) else (0.0, 0.0)


def reward_spread(all_scores: Sequence[ArrayLike]) -> NDArray[np.float64]:
    """
    Explicit margin of prompts with several scored responses: highest minus lowest score.

    Args:
        all_scores (sequence of `n` array-likes):
            Reward scores of all sampled responses of each prompt; the numbers of responses may differ.

    Returns:
        `np.ndarray` of float64, shape `(n,)`: 0 for a single response; NaN if a score is NaN or there is no response.
    """
    rows = [np.asarray(row, dtype=np.float64) for row in all_scores]
    return np.array([row.max() - row.min() if row.size else np.nan for row in rows], dtype=np.float64)


def alignment_potential(
    explicit_margin: ArrayLike,
    implicit_margin: ArrayLike,
    weight: float = 1.0,
    normalize: str = "zscore",
    *,
    moments: tuple[Moments, Moments] | None = None,
) -> NDArray[np.float64]:
    """
    Alignment potential `|d| - weight * |m|` of each pair, on common scales.

    Args:
        explicit_margin (array-like of shape `(n,)`):
            Margin `d` of an external reward: the target.
        implicit_margin (array-like of shape `(n,)`):
            Margin `m` of the current model, in DPO's or in SimPO's form: the present state. With z-scores a factor
            such as beta does not matter. While policy and reference are equal DPO's form is 0 for all pairs and the
            score is the explicit margin alone.
        weight (`float`, *optional*, defaults to `1.0`):
            Factor of the implicit term; the released self-play scripts use 2.5.
        normalize (`str`, *optional*, defaults to `"zscore"`):
            `"zscore"`: both absolute margins become z-scores over the finite entries, as in the released code; a
            constant margin gives 0. `"none"`: raw values.
        moments (`tuple`, *optional*):
            [`margin_moments`] of both margins over the whole dataset, where the pairs given are a part of it; by
            default the z-scores are over the pairs given.

    Returns:
        `np.ndarray` of float64, shape `(n,)`: higher = train on it first; NaN where a margin is not finite.

    Raises:
        `ValueError`: if the margins have different lengths or `normalize` is unknown.
    """
    explicit = np.abs(np.asarray(explicit_margin, dtype=np.float64))
    implicit = np.abs(np.asarray(implicit_margin, dtype=np.float64))
    if explicit.shape != implicit.shape:
        raise ValueError(f"{len(explicit)} explicit margins do not match {len(implicit)} implicit margins")
    if normalize not in ("zscore", "none"):
        raise ValueError(f'normalize must be "zscore" or "none", but is {normalize!r}')
    if normalize == "zscore":
        if moments is None:
            explicit, implicit = zscore(explicit), zscore(implicit)
        else:
            explicit, implicit = (_scaled(v, *m) for v, m in zip((explicit, implicit), moments, strict=True))
    score = explicit - weight * implicit
    return np.where(np.isfinite(score), score, np.nan)


def _scaled(values: NDArray[np.float64], mean: float, deviation: float) -> NDArray[np.float64]:
    return (values - mean) / deviation if deviation > 0 else np.where(np.isfinite(values), 0.0, values)
