"""How much of the data is open at a step: pacing functions, competence and the sets they make eligible."""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .ranking import bottom_k, selectable

Floats = NDArray[np.float64]
Ids = NDArray[np.int64]


def _polynomial(size: int, initial: float, end: float, step: Floats, power: float) -> Floats:
    grown: Floats = size * initial + size * ((1 - initial) / end**power) * step**power
    return grown


def _exponential(size: int, initial: float, end: float, step: Floats, power: float) -> Floats:
    # Past the end the value is cut anyway; the cap keeps exp() finite.
    tau = np.minimum(step / end, 10.0)
    grown: Floats = size * initial + size * ((1 - initial) / (math.exp(10) - 1)) * (np.exp(10 * tau) - 1)
    return grown


def _log(size: int, initial: float, end: float, step: Floats, power: float) -> Floats:
    return size * initial + (size * (1 - initial)) * (1 + 0.1 * np.log(step / end + math.exp(-10)))


def _step(size: int, initial: float, end: float, step: Floats, power: float) -> Floats:
    return size * initial + size * np.floor(step / end)


PACINGS: dict[str, tuple[Callable[[int, float, float, Floats, float], Floats], float]] = {
    "linear": (_polynomial, 1.0),
    "quadratic": (_polynomial, 2.0),
    "root": (_polynomial, 0.5),
    "exponential": (_exponential, 1.0),
    "log": (_log, 1.0),
    "step": (_step, 1.0),
}


def _curve(name: str) -> tuple[Callable[[int, float, float, Floats, float], Floats], float]:
    if name in PACINGS:
        return PACINGS[name]
    if name.startswith("root_p") and name[6:].isdigit() and int(name[6:]) > 0:
        return _polynomial, 1 / int(name[6:])
    raise ValueError(
        f'unknown pacing {name!r}; choose one of {", ".join(PACINGS)} or "root_p<n>", for example "root_p3"'
    )


def pacing_size(
    name: str,
    step: ArrayLike,
    total_steps: int,
    dataset_size: int,
    *,
    initial_fraction: float = 0.2,
    full_at: float = 0.8,
    exact_end: bool = True,
) -> NDArray[np.int64]:
    """
    Number of examples that are open at a step (hf.co/papers/2012.03107, Table 2).

    Args:
        name (`str`):
            One of `"linear"`, `"quadratic"`, `"root"`, `"root_p<n>"`, `"exponential"`, `"log"`, `"step"`.
        step (`int` or `array` of any shape):
            Optimizer step(s), counted from 0.
        total_steps (`int`):
            Planned number of steps.
        dataset_size (`int`):
            Number of examples.
        initial_fraction (`float`, *optional*, defaults to `0.2`):
            Fraction open at step 0, in (0, 1].
        full_at (`float`, *optional*, defaults to `0.8`):
            Fraction of `total_steps` after which everything is open, in [0, 1].
        exact_end (`bool`, *optional*, defaults to `True`):
            Open everything from `full_at * total_steps` on. `False` keeps the rounding of the published arithmetic,
            which can open one example less at that very step.

    Returns:
        `np.ndarray` of int64, of the shape of `step`: sizes in `[1, dataset_size]`, never decreasing in `step`.

    Raises:
        `ValueError`: if `name` is unknown or a fraction is out of range.

    Example:

    ```python
    >>> from dsel_trl.functional.pacing import pacing_size

    >>> pacing_size("linear", [0, 50, 100], total_steps=100, dataset_size=1000, full_at=1.0).tolist()
    [200, 600, 1000]
    ```
    """
    curve, power = _curve(name)
    if not 0 < initial_fraction <= 1:
        raise ValueError(f"`initial_fraction` must lie in (0, 1], got {initial_fraction}")
    if not 0 <= full_at <= 1:
        raise ValueError(f"`full_at` must lie in [0, 1], got {full_at}")
    steps = np.asarray(step, dtype=np.float64)
    end = full_at * total_steps
    if initial_fraction == 1 or end == 0:
        return np.full(steps.shape, dataset_size, dtype=np.int64)
    sizes = np.trunc(curve(dataset_size, initial_fraction, end, steps, power))
    if exact_end:
        # 0.55 * 100 is 55.00000000000001 in floating point: step 55 is the end all the same.
        sizes = np.where(steps >= end - 1e-9 * max(1.0, end), dataset_size, sizes)
    low = 1 if exact_end else 0
    return np.clip(sizes, min(low, dataset_size), dataset_size).astype(np.int64)


def competence(step: ArrayLike, total_steps: float, *, initial: float = 0.01, power: float = 2.0) -> Floats:
    """
    Competence of the model: the fraction of the difficulty range it may see (hf.co/papers/1903.09848, Eq. 8).

    Args:
        step (`int` or `array` of any shape):
            Optimizer step(s), counted from 0.
        total_steps (`float`):
            Step at which the competence reaches 1.
        initial (`float`, *optional*, defaults to `0.01`):
            Competence at step 0, in [0, 1].
        power (`float`, *optional*, defaults to `2.0`):
            1 is linear, 2 the square root that the paper recommends.

    Returns:
        `np.ndarray` of float64, of the shape of `step`, in `[initial, 1]`.

    Raises:
        `ValueError`: if `initial` is not in [0, 1] or `power` is not positive.
    """
    if not 0 <= initial <= 1:
        raise ValueError(f"`initial` must lie in [0, 1], got {initial}")
    if not power > 0:
        raise ValueError(f"`power` must be positive, got {power}")
    steps = np.asarray(step, dtype=np.float64)
    if total_steps <= 0:
        return np.ones(steps.shape)
    floor = initial**power
    grown = np.minimum(1.0, (steps * (1 - floor) / total_steps + floor) ** (1 / power))
    # Rounding can leave 1 - 1e-16 at the last step, which would close the hardest example.
    return np.where(steps >= total_steps, 1.0, grown)


def difficulty_cdf(difficulty: ArrayLike) -> Floats:
    """
    Empirical distribution function of the difficulties: the share of examples that are at most as hard.

    Args:
        difficulty (`array` of shape `(N,)`):
            Difficulty of every example (length, loss, rarity ...). Non-finite entries are unknown.

    Returns:
        `np.ndarray` of float64 of shape `(N,)`: values in (0, 1], equal difficulties have equal values; NaN where the
        difficulty is unknown.
    """
    values = np.asarray(difficulty, dtype=np.float64)
    known = selectable(values)
    ordered = np.sort(values[known])
    cdf = np.full(values.shape, np.nan)
    cdf[known] = np.searchsorted(ordered, values[known], side="right") / max(len(ordered), 1)
    return cdf


def eligible_by_competence(cdf: ArrayLike, level: float, *, at_least_one: bool = True) -> Ids:
    """
    Examples whose difficulty the model is competent for (hf.co/papers/1903.09848, Algorithm 1).

    Args:
        cdf (`array` of shape `(N,)`):
            Values of [`difficulty_cdf`].
        level (`float`):
            Competence in [0, 1].
        at_least_one (`bool`, *optional*, defaults to `True`):
            Return the easiest example when none is eligible.

    Returns:
        `np.ndarray` of int64: ids in ascending order.
    """
    values = np.asarray(cdf, dtype=np.float64)
    # The share of a rank and a level such as 0.7 are rounded differently; equal numbers must stay equal.
    ids = np.flatnonzero(values <= level + 1e-12)
    if len(ids) == 0 and at_least_one:
        return bottom_k(values, 1)
    return ids.astype(np.int64)


def unigram_rarity(token_ids: ArrayLike, offsets: ArrayLike) -> Floats:
    """
    Rarity of every example: minus the sum of its tokens' log unigram probabilities (hf.co/papers/1903.09848, Eq. 2).

    Args:
        token_ids (`array` of int of shape `(T,)`):
            Tokens of all examples, one after another.
        offsets (`array` of int of shape `(N + 1,)`):
            Example i owns `token_ids[offsets[i]:offsets[i + 1]]`.

    Returns:
        `np.ndarray` of float64 of shape `(N,)`, in nats; 0 for an empty example.
    """
    tokens = np.asarray(token_ids, dtype=np.int64)
    bounds = np.asarray(offsets, dtype=np.int64)
    counts = np.bincount(tokens)
    surprise = -np.log(counts[tokens] / max(len(tokens), 1))
    running = np.concatenate([[0.0], np.cumsum(surprise)])
    rarity: Floats = running[bounds[1:]] - running[bounds[:-1]]
    return rarity
