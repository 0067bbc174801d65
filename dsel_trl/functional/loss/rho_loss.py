"""RHO-LOSS: trains on what can be learned and is not learned yet (https://hf.co/papers/2206.07137)."""

import numpy as np
from numpy.typing import ArrayLike, NDArray


def median_irreducible(irreducible: ArrayLike) -> float:
    """Median of the known irreducible losses, the stand-in for a missing one; NaN if none is known."""
    values = np.asarray(irreducible, dtype=np.float64)
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else float("nan")


def reducible_loss(losses: ArrayLike, irreducible: ArrayLike, missing: float | None = None) -> NDArray[np.float64]:
    """
    Reducible loss of each candidate: its current loss minus the loss of a model trained on held-out data.

    Args:
        losses (array-like of shape `(B,)`):
            Current losses: mean token loss for SFT, DPO loss of the pair for preferences.
        irreducible (array-like of shape `(B,)`):
            Irreducible losses of the same examples; NaN = unknown.
        missing (`float`, *optional*):
            Stands for an unknown irreducible loss; defaults to the median of the known ones in `irreducible`. With a
            ledger column at hand pass [`median_irreducible`] of all of it.

    Returns:
        `np.ndarray` of float64, shape `(B,)`: higher = train on it first; NaN where the loss is not finite.

    Raises:
        `ValueError`: if the two have different lengths.
    """
    current, floor = np.asarray(losses, dtype=np.float64), np.asarray(irreducible, dtype=np.float64)
    if current.shape != floor.shape:
        raise ValueError(f"{current.size} losses do not match {floor.size} irreducible losses")
    stand_in = median_irreducible(floor) if missing is None else missing
    reducible = current - np.where(np.isfinite(floor), floor, stand_in)
    return np.where(np.isfinite(reducible), reducible, np.nan)
