"""BeeS: fuses several margin sources into one probability that a pair is worth training on (https://hf.co/papers/2502.14560)."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..ranking import Ids, top_k

IMPLICIT_DIVISOR = 2.0
EXTERNAL_DIVISOR = 1.5


def upper_bound(margins: ArrayLike, divisor: float, min_count: int = 30) -> int:
    """
    Upper bound M2 of a margin source: cuts off the sparse right tail (appendix B).

    Starting at `int(max / divisor)`, the bound grows by 1 until fewer than `min_count` margins, or fewer margins than
    units of margin, are left above it.

    Args:
        margins (array-like of shape `(n,)`):
            Margins of one source; non-finite entries are left out.
        divisor (`float`):
            2 for the implicit source, 1.5 for the external one.
        min_count (`int`, *optional*, defaults to `30`):
            Number of margins that make a tail worth keeping.

    Returns:
        `int`: 0 if no margin is finite.

    Raises:
        `ValueError`: if `divisor` is not positive.
    """
    if not divisor > 0:
        raise ValueError(f"the divisor must be positive, but is {divisor}")
    values = np.asarray(margins, dtype=np.float64)
    values = np.sort(values[np.isfinite(values)])
    if len(values) == 0:
        return 0
    largest = float(values[-1])
    bound = int(largest / divisor)
    while bound <= largest:
        above = len(values) - int(np.searchsorted(values, bound, side="right"))
        if above < min_count or above < largest - bound:
            break
        bound += 1
    return bound


def margin_probability(
    margins: ArrayLike, lower: float, upper: float, scale: str = "bound", missing: str = "half"
) -> NDArray[np.float64]:
    """
    Maps margins to [0, 1]: `(clip(m, lower, upper) - lower) / (upper - lower)` (equation 3).

    Args:
        margins (array-like of shape `(n,)`):
            Margins of one source.
        lower (`float`), upper (`float`):
            The bounds M1 and M2. A source without information (`upper <= lower`, or no margin above `lower`) gives
            0.5.
        scale (`str`, *optional*, defaults to `"bound"`):
            `"bound"` divides by `upper - lower`; `"observed"` by the largest clipped margin minus `lower`, as a known
            replication does. They differ only if no margin reaches `upper`.
        missing (`str`, *optional*, defaults to `"half"`):
            What a non-finite margin gives: `"half"` leaves the source out for this pair (0.5); `"zero"` takes it as a
            margin of 0, as the replication does.

    Returns:
        `np.ndarray` of float64, shape `(n,)`.

    Raises:
        `ValueError`: if `scale` or `missing` is unknown.
    """
    if scale not in ("bound", "observed"):
        raise ValueError(f'scale must be "bound" or "observed", but is {scale!r}')
    if missing not in ("half", "zero"):
        raise ValueError(f'missing must be "half" or "zero", but is {missing!r}')
    values = np.asarray(margins, dtype=np.float64)
    if missing == "zero":
        values = np.where(np.isfinite(values), values, 0.0)
    finite = np.isfinite(values)
    known = values[finite]
    if upper <= lower or len(known) == 0 or known.max() <= lower:
        return np.full(len(values), 0.5)
    clipped = np.clip(known, lower, upper)
    top = upper if scale == "bound" else clipped.max()
    probability = np.full(len(values), 0.5)
    probability[finite] = (clipped - lower) / (top - lower)
    return probability


def fuse_probabilities(probabilities: Sequence[ArrayLike], clamp: float = 1e-6) -> NDArray[np.float64]:
    """
    Fuses sources: `prod p / (prod p + prod (1 - p))` (equation 3, K sources).

    Args:
        probabilities (sequence of K array-likes of shape `(n,)`):
            One row per source ([`margin_probability`]).
        clamp (`float`, *optional*, defaults to `1e-6`):
            Every p is kept in `[clamp, 1 - clamp]`, so that two sources that contradict each other completely give
            0.5. With 0 such pairs are 0/0 and give NaN.

    Returns:
        `np.ndarray` of float64, shape `(n,)`.

    Raises:
        `ValueError`: if there is no source, or the sources have different lengths.
    """
    rows = np.clip(_stack(probabilities), clamp, 1 - clamp)
    agree, disagree = rows.prod(axis=0), (1 - rows).prod(axis=0)
    with np.errstate(invalid="ignore"):
        fused: NDArray[np.float64] = agree / (agree + disagree)
    return fused


def fuse_margins(margins: Sequence[ArrayLike], how: str = "add") -> NDArray[np.float64]:
    """
    Fuses raw margins without probabilities: their sum, maximum or minimum.

    Args:
        margins (sequence of K array-likes of shape `(n,)`):
            One row per source. A non-finite margin counts as 0.
        how (`str`, *optional*, defaults to `"add"`):
            `"add"`, `"max"` or `"min"`.

    Returns:
        `np.ndarray` of float64, shape `(n,)`.

    Raises:
        `ValueError`: if `how` is unknown, there is no source, or the sources have different lengths.
    """
    rows = _stack(margins)
    rows = np.where(np.isfinite(rows), rows, 0.0)
    if how not in ("add", "max", "min"):
        raise ValueError(f'how must be "add", "max" or "min", but is {how!r}')
    if how == "add":
        return np.asarray(rows.sum(axis=0))
    return np.asarray(rows.max(axis=0) if how == "max" else rows.min(axis=0))


def unclipped_evidence(margins: Sequence[ArrayLike], lower: float, uppers: Sequence[float]) -> NDArray[np.float64]:
    """
    Sum of the scaled margins without clipping, `sum_k (m_k - M1) / (M2_k - M1)`: ranks pairs whose fused value is
    equal because their margins lie above the bounds. Sources without information and missing margins add 0.
    """
    rows = _stack(margins)
    total = np.zeros(rows.shape[1])
    for row, upper in zip(rows, uppers, strict=True):
        if upper > lower:
            total += np.where(np.isfinite(row), (row - lower) / (upper - lower), 0.0)
    return total


def select_fused(fused: ArrayLike, num: int, tie_break: ArrayLike | None = None, nan_wins: bool = False) -> Ids:
    """
    The `num` pairs with the highest fused value, best first.

    Args:
        fused (array-like of shape `(n,)`):
            Fused values.
        num (`int`):
            Number of pairs; clamped to [1, number of finite values].
        tie_break (array-like of shape `(n,)`, *optional*):
            Second key ([`unclipped_evidence`]), higher first; the lower id decides last.
        nan_wins (`bool`, *optional*, defaults to `False`):
            Puts NaN values first, as a known replication does by sorting them last and taking the end.

    Returns:
        `np.ndarray` of int64.
    """
    values = np.asarray(fused, dtype=np.float64)
    if nan_wins:
        values = np.where(np.isnan(values), np.finfo(np.float64).max, values)
    if tie_break is None:
        return top_k(values, num)
    ids = np.flatnonzero(np.isfinite(values))
    second = np.nan_to_num(np.asarray(tie_break, dtype=np.float64)[ids], nan=-np.inf)
    order = ids[np.lexsort((ids, -second, -values[ids]))]
    return order[: len(top_k(values, num))]


def _stack(sources: Sequence[ArrayLike]) -> NDArray[np.float64]:
    rows = [np.asarray(source, dtype=np.float64) for source in sources]
    if not rows:
        raise ValueError("at least one margin source is needed, got none")
    if len({row.shape for row in rows}) > 1:
        raise ValueError(f"the sources must have one margin per pair, but have lengths {[len(row) for row in rows]}")
    return np.stack(rows)
