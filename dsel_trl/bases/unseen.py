"""Live scores of examples that were not seen yet."""

import numpy as np

from ..functional.ranking import selectable


def with_unseen(scores: np.ndarray, rng: np.random.Generator, seen: np.ndarray | None = None) -> np.ndarray:
    """
    Live scores with the unknown ones filled in: an example not seen yet counts as a random seen one.

    So it is kept as often as the examples known so far, and neither crowds them out nor is shut out. Before anything
    is known (or while all known scores are equal, as the margins of an untrained policy are) the order is random.
    An example that is `seen` (`(N,)` bool) and has no score all the same stays unknown, unless nothing else is left.
    Infinite scores are decisions (never selectable), not gaps.
    """
    known, unseen = selectable(scores), np.isnan(scores)
    values = scores[known]
    if seen is not None and (known | (unseen & ~seen)).any():
        unseen &= ~seen
    if not len(values) or is_constant(values):
        return np.where(known | unseen, rng.random(len(scores), dtype=np.float32), scores)
    if known.all():
        return scores
    filled = scores.copy()
    filled[unseen] = rng.choice(values, size=int(unseen.sum()))
    return filled


def stand_ins(scores: np.ndarray) -> str:
    """What is said of scores that [`with_unseen`] has filled in, if there are any."""
    return "; an example not seen yet counts as one of those seen, drawn" if np.isnan(scores).any() else ""


def is_constant(values: np.ndarray) -> bool:
    """Whether scores tell no two examples apart: they differ by no more than rounding."""
    return len(values) > 0 and bool(np.ptp(values.astype(np.float64)) < 1e-6)
