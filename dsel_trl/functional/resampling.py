"""What a few seeds say of a difference: a bootstrap over pairs."""

import numpy as np
from numpy.typing import ArrayLike

RESAMPLES = 10_000


def bootstrap_interval(
    differences: ArrayLike, rng: np.random.Generator, *, level: float = 0.95, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """
    Percentile bootstrap interval of a mean of paired differences (Efron and Tibshirani, 1993, section 13.3).

    Args:
        differences (`array` of shape `(n,)`):
            One difference per pair, such as method less stock with the same seed.
        rng (`np.random.Generator`):
            Draws the resamples.
        level (`float`, *optional*, defaults to `0.95`):
            Share of the resampled means that lies inside.
        resamples (`int`, *optional*, defaults to `10_000`):
            Number of draws.

    Returns:
        `tuple[float, float]`: NaN and NaN for fewer than two differences, of which no spread can be told.

    Raises:
        `ValueError`: for a difference that is not finite, or a level outside (0, 1).

    Example:

    ```python
    >>> bootstrap_interval([1.0, 1.0, 1.0], np.random.default_rng(0))
    (1.0, 1.0)
    ```
    """
    values = np.asarray(differences, dtype=np.float64)
    if not 0 < level < 1:
        raise ValueError(f"level={level!r} must be between 0 and 1.")
    if not np.isfinite(values).all():
        raise ValueError(f"differences {values.tolist()} must be finite: leave a pair out that has none.")
    if len(values) < 2:
        return float("nan"), float("nan")
    means = values[rng.integers(0, len(values), (resamples, len(values)))].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
