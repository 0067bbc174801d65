"""Which ids come first: ranking, cutting and drawing from one score per example (higher = train on it first).

Rules that hold for every function here: a NaN or infinite score is never selected, ties go to the lower id, sorts are
stable, `k` is clamped to [1, number of selectable scores], and random draws take their own generator.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Ids = NDArray[np.int64]


def _as_scores(scores: ArrayLike) -> NDArray[Any]:
    """One-dimensional float array; float32 and float64 are kept as they are, so large ledgers are not copied."""
    values = np.asarray(scores)
    if values.ndim != 1:
        raise ValueError(f"scores must be one-dimensional, one per example, but have shape {values.shape}")
    if values.dtype in (np.float32, np.float64):
        return values
    return values.astype(np.float32 if values.dtype == np.float16 else np.float64)


def _clamp_k(k: int, n_valid: int) -> int:
    if k < 0:
        raise ValueError(f"k must be at least 1, but is {k}")
    return min(max(int(k), 1), n_valid)


def _generator(rng: np.random.Generator | None, why: str) -> np.random.Generator:
    if rng is None:
        raise ValueError(f"{why} draws at random: pass rng=numpy.random.default_rng(seed), got None")
    return rng


def _stable_argsort(values: NDArray[Any]) -> Ids:
    """Ascending stable argsort of finite values."""
    if values.dtype != np.float32 or len(values) >= 2**32:
        return np.argsort(values, kind="stable").astype(np.int64, copy=False)
    # A float32 and its position fit into one uint64 whose plain sort is the stable argsort, at about half the time.
    # Adding 0.0 merges -0.0 with 0.0; flipping bits makes the unsigned order equal to the numeric one.
    bits = (values + np.float32(0.0)).view(np.uint32)
    bits ^= np.where(bits >> 31, np.uint32(0xFFFFFFFF), np.uint32(0x80000000))
    keys = bits.astype(np.uint64)
    keys <<= np.uint64(32)
    keys |= np.arange(len(values), dtype=np.uint64)
    keys.sort()
    keys &= np.uint64(0xFFFFFFFF)
    return keys.view(np.int64)


def selectable(scores: ArrayLike) -> NDArray[np.bool_]:
    """Boolean array `(n,)`: `True` where the score is finite, so that a ranking may choose the example."""
    valid: NDArray[np.bool_] = np.isfinite(_as_scores(scores))
    return valid


def keep_count(fraction: float, n_valid: int) -> int:
    """
    Number of examples that a fraction stands for: `floor(fraction * n_valid)`, at least 1, at most `n_valid`.

    Args:
        fraction (`float`):
            Share to keep, in (0, 1].
        n_valid (`int`):
            Number of examples that can be chosen at all. With 0 the answer is 0.

    Raises:
        `ValueError`: if `fraction` is not in (0, 1] or `n_valid` is negative.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"the fraction to keep must be in (0, 1], but is {fraction}")
    if n_valid < 0:
        raise ValueError(f"the number of selectable examples cannot be negative, but is {n_valid}")
    return min(max(_guarded_floor(fraction * n_valid), 1), n_valid)


def _guarded_floor(value: float) -> int:
    # 0.29 * 100 is 28.999999999999996 in binary: a product this close below an integer means that integer.
    return math.floor(value + 1e-12 * max(1.0, abs(value)))


def zscore(values: ArrayLike) -> NDArray[np.float64]:
    """
    Standard scores over the finite entries, with the population standard deviation (ddof 0).

    Returns `np.ndarray` of float64, shape `(n,)`: zeros for a constant vector; non-finite entries become NaN.
    """
    raw = _as_scores(values).astype(np.float64)
    valid = np.isfinite(raw)
    scores = np.full(len(raw), np.nan)
    finite = raw[valid]
    if len(finite) == 0:
        return scores
    # A constant vector is tested by its range: its computed deviation may be a rounding error instead of 0.
    spread = finite.std()
    constant = finite.max() == finite.min() or spread == 0
    scores[valid] = 0.0 if constant else (finite - finite.mean()) / spread
    return scores


def rank_order(scores: ArrayLike, descending: bool = True) -> Ids:
    """
    All ids in the order of their scores.

    Args:
        scores (array-like of shape `(n,)`):
            One score per example, for example a ledger column.
        descending (`bool`, *optional*, defaults to `True`):
            Whether the highest score comes first.

    Returns:
        `np.ndarray` of int64, shape `(n,)`: a permutation of `0..n-1`. Ties go to the lower id in both directions;
        unselectable ids come last, in id order.
    """
    values = _as_scores(scores)
    valid = np.isfinite(values)
    if valid.all():
        return _stable_argsort(-values if descending else values)
    ids = np.flatnonzero(valid)
    kept = values[ids]
    return np.concatenate([ids[_stable_argsort(-kept if descending else kept)], np.flatnonzero(~valid)])


def top_k(scores: ArrayLike, k: int) -> Ids:
    """
    The `k` highest selectable scores, best first, in linear time plus a sort of `k`.

    Returns `np.ndarray` of int64: `k` ids, fewer if fewer are selectable. A negative `k` raises `ValueError`.
    """
    return _first_k(-_as_scores(scores), k)


def bottom_k(scores: ArrayLike, k: int) -> Ids:
    """The `k` lowest selectable scores, lowest first, by the rules of [`top_k`]."""
    return _first_k(_as_scores(scores), k)


def _first_k(costs: NDArray[Any], k: int) -> Ids:
    valid = np.isfinite(costs)
    ids = np.flatnonzero(valid)
    k = _clamp_k(k, len(ids))
    if k == 0:
        return ids
    kept = costs if len(ids) == len(costs) else costs[ids]
    if k < len(kept):
        cut = np.partition(kept, k - 1)[k - 1]
        inside = kept < cut
        ties = np.flatnonzero(kept == cut)
        inside[ties[: k - int(np.count_nonzero(inside))]] = True
        ids, kept = ids[inside], kept[inside]
    return ids[_stable_argsort(kept)]


def band(scores: ArrayLike, low: float, high: float) -> Ids:
    """
    The ids whose rank fraction lies in [`low`, `high`) of the ascending order of the selectable scores.

    The rank fraction of the r-th lowest of m selectable scores (r from 0) is r/m: `band(scores, 0, 1)` is everything.
    A band that falls between two ranks gives the one rank next to it, so a band is never empty while scores exist.

    Returns `np.ndarray` of int64, lowest score first. Raises `ValueError` unless `0 <= low < high <= 1`.
    """
    n_valid = int(np.count_nonzero(selectable(scores)))
    first, last = band_ranks(low, high, n_valid)
    return rank_order(scores, descending=False)[:n_valid][first:last]


def band_ranks(low: float, high: float, n_valid: int) -> tuple[int, int]:
    """The ranks that [`band`] keeps of `n_valid` ones, from 0: the first, and the one after the last."""
    if not 0 <= low < high <= 1:
        raise ValueError(f"a band needs 0 <= low < high <= 1, but got low={low}, high={high}")
    first, last = -_guarded_floor(-low * n_valid), -_guarded_floor(-high * n_valid)
    if first == last and n_valid:
        first = min(first, n_valid - 1)
        last = first + 1
    return first, last


def threshold(scores: ArrayLike, quantile: float) -> float:
    """
    The quantile of the selectable scores, with linear interpolation.

    Returns `float`: NaN if nothing is selectable, so that no score passes `score >= threshold`. A `quantile` outside
    [0, 1] raises `ValueError`.
    """
    if not 0 <= quantile <= 1:
        raise ValueError(f"a quantile must be in [0, 1], but is {quantile}")
    values = _as_scores(scores)
    finite = values[np.isfinite(values)]
    return float(np.quantile(finite.astype(np.float64), quantile)) if len(finite) else math.nan


def gumbel_top_k(
    scores: ArrayLike,
    k: int,
    temperature: float = 1.0,
    rng: np.random.Generator | None = None,
    noise: ArrayLike | None = None,
) -> Ids:
    """
    Draws `k` ids without replacement from `softmax(scores / temperature)` by the Gumbel trick.

    Args:
        scores (array-like of shape `(n,)`):
            One logit per example.
        k (`int`):
            How many ids to draw; clamped to [1, number of selectable scores].
        temperature (`float`, *optional*, defaults to `1.0`):
            0 gives the plain [`top_k`], infinity a uniform draw.
        rng (`np.random.Generator`, *optional*):
            Where the noise comes from. Needed unless `noise` is given or `temperature` is 0.
        noise (array-like of shape `(n,)`, *optional*):
            Gumbel(0, 1) noise to use instead of drawing.

    Returns:
        `np.ndarray` of int64: ids in the order of the draw.

    Raises:
        `ValueError`: if `temperature` is negative, or neither `rng` nor `noise` is given.
    """
    values = _as_scores(scores)
    if not temperature >= 0:
        raise ValueError(f"the temperature must not be negative, but is {temperature}")
    if temperature == 0:
        return top_k(values, k)
    if noise is None:
        # The logarithm of an exponential draw is a negative Gumbel one. It is drawn in the precision of the scores, as
        # float32 ranks in half the time. A draw of exactly 0 would be an infinite key, which is never chosen.
        draws = _generator(rng, "gumbel_top_k").standard_exponential(len(values), dtype=values.dtype.type)
        noise = -np.log(np.maximum(draws, np.finfo(values.dtype).tiny))
    else:
        noise = np.asarray(noise, dtype=np.float64)
    return top_k(values / temperature + noise, k)


def epsilon_mix(order: ArrayLike, k: int, epsilon: float, rng: np.random.Generator | None = None) -> Ids:
    """
    Takes `k` ids slot by slot: the best one left, or with probability `epsilon` any one left, uniformly.

    Args:
        order (array-like of int, shape `(m,)`):
            Ids, best first (for example from [`rank_order`]), without repetition.
        k (`int`):
            Number of slots; clamped to [1, m].
        epsilon (`float`):
            Probability of a random pick per slot. 0 gives `order[:k]`.
        rng (`np.random.Generator`, *optional*):
            Where the draws come from. Needed unless `epsilon` is 0.

    Returns:
        `np.ndarray` of int64: distinct ids in the order of the slots.

    Raises:
        `ValueError`: if `epsilon` is not in [0, 1], or `rng` is missing where it is needed.
    """
    ranked = np.asarray(order, dtype=np.int64)
    if not 0 <= epsilon <= 1:
        raise ValueError(f"epsilon must be in [0, 1], but is {epsilon}")
    k = _clamp_k(k, len(ranked))
    if epsilon == 0 or k == 0:
        return ranked[:k]
    rng = _generator(rng, "epsilon_mix")
    # The next untaken id of one random permutation is uniform among the ids left: one draw serves every random slot.
    shuffled = rng.permutation(ranked).tolist()
    at_random = (rng.random(k) < epsilon).tolist()
    best, lucky = iter(ranked.tolist()), iter(shuffled)
    taken: dict[int, None] = {}
    for random_slot in at_random:
        taken[next(i for i in (lucky if random_slot else best) if i not in taken)] = None
    return np.fromiter(taken, dtype=np.int64, count=k)


def softmax_weights(scores: ArrayLike, temperature: float = 1.0, normalize: str = "sum1") -> NDArray[np.float64]:
    """
    Weights `softmax(scores / temperature)` over the selectable scores.

    Args:
        scores (array-like of shape `(n,)`):
            One score per example.
        temperature (`float`, *optional*, defaults to `1.0`):
            Divides the scores; must be positive.
        normalize (`str`, *optional*, defaults to `"sum1"`):
            `"sum1"`: they sum to 1; `"mean1"`: they average 1 over the selectable scores; `"none"`: the largest is 1.

    Returns:
        `np.ndarray` of float64, shape `(n,)`: 0 for unselectable entries; all zeros if none is selectable.

    Raises:
        `ValueError`: if `temperature` is not positive or `normalize` is unknown.
    """
    if not temperature > 0:
        raise ValueError(f"the temperature must be positive, but is {temperature}")
    if normalize not in ("sum1", "mean1", "none"):
        raise ValueError(f'normalize must be "sum1", "mean1" or "none", but is {normalize!r}')
    values = _as_scores(scores)
    valid = np.isfinite(values)
    weights = np.zeros(len(values))
    if not valid.any():
        return weights
    finite = values[valid].astype(np.float64)
    exponentials = np.exp((finite - finite.max()) / temperature)
    scale = {"none": 1.0, "sum1": exponentials.sum(), "mean1": exponentials.mean()}[normalize]
    weights[valid] = exponentials / scale
    return weights
