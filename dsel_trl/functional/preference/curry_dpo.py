"""Curry-DPO: pairs the best response with each other one, large gaps first (https://hf.co/papers/2403.07230)."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ..ranking import Ids, rank_order, selectable


class Pair(NamedTuple):
    """Two responses of a prompt, by position, and the gap of their scores."""

    chosen: int
    rejected: int
    gap: float


def rank_responses(scores: ArrayLike) -> Ids:
    """Positions of the responses of a prompt, best first; ties to the lower position, non-finite scores left out."""
    return rank_order(scores)[: int(selectable(scores).sum())]


def by_falling_gap(gaps: ArrayLike) -> Ids:
    """
    Positions of pairs from easy to hard: those with a gap above 0, largest first, ties to the lower position.

    Args:
        gaps (array-like of shape `(n,)`):
            Score gap of each pair; NaN where it has none.

    Returns:
        `np.ndarray` of int64.
    """
    values = np.asarray(gaps, dtype=np.float64)
    return rank_responses(np.where(values > 0, values, np.nan))


def curriculum_pairs(scores: ArrayLike) -> list[Pair]:
    """
    Pairs of a prompt from easy to hard: the best response against each lower one.

    Args:
        scores (array-like of shape `(m,)`):
            Score of each response; a non-finite one drops its response.

    Returns:
        list of [`Pair`] by falling gap. A response as good as the best gives no pair; a prompt with fewer than two
        valid responses gives none at all.
    """
    order = rank_responses(scores)
    values = np.asarray(scores, dtype=np.float64)
    best = order[0] if len(order) else -1
    pairs = [Pair(int(best), int(other), float(values[best] - values[other])) for other in order[1:]]
    return [pairs[position] for position in by_falling_gap([pair.gap for pair in pairs])]


def curriculum_stages(
    pairs_per_prompt: Sequence[Sequence[Pair]], n_stages: int | None = None
) -> list[list[tuple[int, Pair]]]:
    """
    Stages of a run: stage s holds the s-th easiest pair of every prompt that has one.

    Args:
        pairs_per_prompt (sequence of sequences of [`Pair`]):
            From [`curriculum_pairs`].
        n_stages (`int`, *optional*):
            Number of stages: one less than the largest number of responses, each of them being a rival of the best.
            Defaults to the largest number of pairs.

    Returns:
        list of stages; a stage lists `(prompt position, pair)`. Prompts with fewer pairs appear in the first stages
        only, so that a late stage may be empty.
    """
    most = max((len(pairs) for pairs in pairs_per_prompt), default=0)
    n_stages = most if n_stages is None else n_stages
    return [
        [(prompt, pairs[stage]) for prompt, pairs in enumerate(pairs_per_prompt) if stage < len(pairs)]
        for stage in range(n_stages)
    ]


def split_stages(gaps: ArrayLike, n_stages: int = 3) -> list[Ids]:
    """
    Stages for data with one pair per prompt: the pairs by falling gap, cut into parts of equal size.

    Args:
        gaps (array-like of shape `(n,)`):
            Score gap of each pair. Pairs with a gap of 0 or less, or without one, are dropped.
        n_stages (`int`, *optional*, defaults to `3`):
            Number of stages.

    Returns:
        list of `np.ndarray` of int64, easiest stage first; their sizes differ by at most one.

    Raises:
        `ValueError`: if `n_stages` is below 1.
    """
    if n_stages < 1:
        raise ValueError(f"n_stages must be at least 1, but is {n_stages}")
    return list(np.array_split(by_falling_gap(gaps), n_stages))
