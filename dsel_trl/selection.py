"""What to do about a score: keep, weigh, sample or order by it. Written once, shared by all methods."""

from collections.abc import Callable

import numpy as np

from .functional.ranking import band, keep_count, rank_order, selectable, top_k
from .method import Run


def known_scores(run: Run, name: str) -> np.ndarray:
    """The ledger's scores under `name`, all NaN before anything was written."""
    run.ledger.add(name)
    return run.ledger[name]


def with_unseen(scores: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """
    Live scores with the unknown ones filled in: an example not seen yet counts as a random seen one.

    So it is kept as often as the examples known so far, and neither crowds them out nor is shut out. Before anything is
    known (or while all known scores are equal, as the margins of an untrained policy are) the order is random.
    """
    known = selectable(scores)
    values = scores[known]
    if not len(values) or np.ptp(values.astype(np.float64)) < 1e-6:
        return rng.random(len(scores), dtype=np.float32)
    if known.all():
        return scores
    filled = scores.copy()
    # Infinite scores are decisions (never selectable), not gaps.
    unseen = np.isnan(scores)
    filled[unseen] = rng.choice(values, size=int(unseen.sum()))
    return filled


def keep_top(scores: np.ndarray, fraction: float, count: int | None = None) -> np.ndarray:
    """Mask of the best `fraction` of the selectable scores (or of `count` examples), `(N,)` bool."""
    valid = selectable(scores)
    size = keep_count(fraction, int(valid.sum())) if count is None else count
    mask = np.zeros(len(scores), dtype=bool)
    mask[top_k(scores, size)] = True
    return mask


def keep_band(scores: np.ndarray, low: float, high: float) -> np.ndarray:
    """Mask of the scores whose rank, counted from the lowest as a share of the selectable ones, is in [low, high)."""
    mask = np.zeros(len(scores), dtype=bool)
    mask[band(scores, low, high)] = True
    return mask


def in_order(scores: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """`ids` by descending score, ties by the lower id, unselectable ones last."""
    ids = np.sort(ids)
    return ids[rank_order(scores[ids], descending=True)]


def paced(
    scores: np.ndarray,
    ids: np.ndarray,
    fraction: Callable[[float], float],
    *,
    served: int,
    epoch_length: int,
    rng: np.random.Generator,
    blocks: int = 100,
) -> np.ndarray:
    """
    `ids` so that at progress p of the epoch only the best `fraction(p)` of it has been drawn from, in random order.

    Args:
        scores (`np.ndarray` of shape `(N,)`):
            Higher = earlier.
        ids (`np.ndarray`):
            Examples left in this epoch.
        fraction (`Callable[[float], float]`):
            Share of the epoch's examples that is open at progress p in [0, 1]; monotone.
        served (`int`):
            Examples served before in this epoch.
        epoch_length (`int`):
            Examples per epoch.
        blocks (`int`, *optional*, defaults to `100`):
            How often per epoch the open share is looked at.
    """
    ranked = in_order(scores, ids)
    size = max(1, -(-epoch_length // blocks))
    starts = np.arange(0, len(ranked), size)
    opened = np.array([fraction((served + start) / epoch_length) * epoch_length for start in starts]) - served
    # A block can never be served from fewer examples than it has.
    limits = np.clip(np.maximum(np.ceil(opened).astype(np.int64), starts + size), 0, len(ranked))
    pool, waiting, reached, planned = np.empty_like(ranked), 0, 0, []
    for limit in limits.tolist():
        if limit > reached:
            pool[waiting : waiting + limit - reached] = ranked[reached:limit]
            waiting, reached = waiting + limit - reached, limit
        count = min(size, waiting)
        taken = rng.choice(waiting, count, replace=False)
        planned.append(pool[taken])
        # The places that were drawn are filled from the end of the pool: a block costs what it draws, not the pool.
        waiting -= count
        spare = np.ones(count, dtype=bool)
        spare[taken[taken >= waiting] - waiting] = False
        pool[taken[taken < waiting]] = pool[waiting + np.flatnonzero(spare)]
    return np.concatenate(planned)
