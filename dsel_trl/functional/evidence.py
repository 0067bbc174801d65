"""Comparing selectors: efficiency and feasibility measures of a survey (hf.co/papers/2406.14115)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

BASELINE = ((0.025, 1.400), (0.058, 1.443))
"""(selected fraction, improvement ratio) of the two methods that span the survey's baseline."""

ANCHORS = {"same_benchmark": ((0.949, 1.284), (1.01, 1.475)), "other_benchmark": ((0.985, 1.344), (1.000, 1.426))}
"""Pairs (benchmark ratio, win-rate ratio) through which other kinds of evaluation are mapped to win rates."""

MANY_MODELS, MANY_MODELS_PENALTY = 100, 200.0


def selected_fraction(num_selected: int, num_candidates: int) -> float:
    """
    SDF, the selected dataset fraction (hf.co/papers/2406.14115, section 5).

    Args:
        num_selected (`int`):
            Examples trained on.
        num_candidates (`int`):
            Examples to choose from.

    Raises:
        `ValueError`: unless `0 <= num_selected <= num_candidates` and there are candidates.
    """
    if not 0 <= num_selected <= num_candidates or num_candidates == 0:
        raise ValueError(f"cannot have selected {num_selected} of {num_candidates} candidates")
    return num_selected / num_candidates


def improvement_ratio(selected_scores: ArrayLike, baseline_scores: ArrayLike, kind: str = "same_win_rate") -> float:
    """
    PIR, the performance improvement ratio, on the win-rate scale (hf.co/papers/2406.14115, section 5).

    Args:
        selected_scores (`array` of shape `(K,)`):
            Scores of the model trained on the selection.
        baseline_scores (`array` of shape `(K,)` or `(1,)`):
            Scores of the model trained on everything; a single one is used for all.
        kind (`str`, *optional*, defaults to `"same_win_rate"`):
            `"same_win_rate"`: the mean ratio as it is. `"same_benchmark"`, `"other_benchmark"`: mapped linearly
            through the survey's anchor points.

    Returns:
        `float`: NaN for a benchmark ratio of exactly 0, which stands for a missing result.

    Raises:
        `ValueError`: if the lengths do not fit, a baseline score is 0 or `kind` is unknown.

    Example:

    ```python
    >>> from dsel_trl.functional.evidence import improvement_ratio

    >>> improvement_ratio([1.5, 2.5], [1.0])
    2.0
    ```
    """
    selected = np.atleast_1d(np.asarray(selected_scores, dtype=np.float64))
    baseline = np.atleast_1d(np.asarray(baseline_scores, dtype=np.float64))
    if len(selected) == 0 or len(baseline) not in (1, len(selected)):
        raise ValueError(
            f"pass one baseline score, or one for each of the {len(selected)} selected scores; got {len(baseline)}"
        )
    if (baseline == 0).any():
        raise ValueError(f"no ratio to a baseline score of 0, got {baseline.tolist()}: leave such a result out")
    ratio = float(np.mean(selected / baseline))
    if kind == "same_win_rate":
        return ratio
    if kind not in ANCHORS:
        raise ValueError(f'`kind` must be "same_win_rate" or one of {", ".join(ANCHORS)}, got {kind!r}')
    return float("nan") if ratio == 0 else float(_line(ratio, ANCHORS[kind]))


def efficiency(fraction: ArrayLike, ratio: ArrayLike) -> Floats:
    """
    Height above the survey's baseline in the plane of fraction and improvement ratio; larger is better.

    It orders methods as the survey's perpendicular distance does, because all share the one line.

    Args:
        fraction (`array` of shape `(K,)`):
            Selected fractions.
        ratio (`array` of shape `(K,)`):
            Improvement ratios.

    Returns:
        `np.ndarray` of float64 of shape `(K,)`.
    """
    heights: Floats = np.asarray(ratio, dtype=np.float64) - _line(np.asarray(fraction, dtype=np.float64), BASELINE)
    return heights


def dense_rank(values: ArrayLike, *, descending: bool = False, tolerance: float = 1e-6) -> NDArray[np.int64]:
    """
    Ranks from 1 without gaps; values within the tolerance of the first of their group share a rank.

    Args:
        values (`array` of shape `(K,)`):
            Values to rank.
        descending (`bool`, *optional*, defaults to `False`):
            Whether the largest value has rank 1.
        tolerance (`float`, *optional*, defaults to `1e-6`):
            Largest difference that counts as equal.

    Returns:
        `np.ndarray` of int64 of shape `(K,)`.
    """
    keys = np.asarray(values, dtype=np.float64) * (-1 if descending else 1)
    ranks = np.zeros(len(keys), dtype=np.int64)
    rank, first = 0, 0.0
    for position in np.argsort(keys, kind="stable"):
        if rank == 0 or keys[position] - first > tolerance:
            rank, first = rank + 1, float(keys[position])
        ranks[position] = rank
    return ranks


def simplicity_penalty(num_models: float, num_steps: float, public_code: bool, *, model_weight: float = 2.0) -> float:
    """
    Penalty for an elaborate selector (hf.co/papers/2406.14115, section 5).

    Args:
        num_models (`float`):
            LLMs that are trained for the selector. More than 100 cost a fixed 200.
        num_steps (`float`):
            Steps of the algorithm.
        public_code (`bool`):
            Whether code is public; if not, the penalty grows by 1.
        model_weight (`float`, *optional*, defaults to `2.0`):
            Penalty per trained LLM. The survey counts a small one with 1.5.

    Returns:
        `float`.
    """
    if num_models > MANY_MODELS:
        return MANY_MODELS_PENALTY
    return num_models * model_weight + num_steps + (0 if public_code else 1)


def flexibility_penalty(model_free: bool, dataset_free: bool, proprietary_free: bool) -> int:
    """
    Penalty for what a selector is tied to (hf.co/papers/2406.14115, section 5).

    Args:
        model_free (`bool`):
            Whether it works without a specific model; otherwise 3.
        dataset_free (`bool`):
            Whether it works without a specific dataset; otherwise 2.
        proprietary_free (`bool`):
            Whether it works without a proprietary model; otherwise 1.

    Returns:
        `int`.
    """
    return 3 * (not model_free) + 2 * (not dataset_free) + (not proprietary_free)


def feasibility_ranks(
    simplicity: Sequence[float], flexibility: Sequence[float]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """
    Ranks of methods by their penalties; lower is better (hf.co/papers/2406.14115, section 5).

    Args:
        simplicity (`Sequence[float]`):
            Results of [`simplicity_penalty`], one per method.
        flexibility (`Sequence[float]`):
            Results of [`flexibility_penalty`], one per method.

    Returns:
        `tuple[np.ndarray, np.ndarray, np.ndarray]`: dense ranks by simplicity, by flexibility, and by the sum of both.
    """
    simple, flexible = dense_rank(simplicity), dense_rank(flexibility)
    return simple, flexible, dense_rank(simple + flexible)


def _line(x: Any, points: tuple[tuple[float, float], tuple[float, float]]) -> Any:
    (x1, y1), (x2, y2) = points
    return y1 + (y2 - y1) / (x2 - x1) * (x - x1)
