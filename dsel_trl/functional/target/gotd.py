"""GOT-D: what a unit of mass on an example does to the distance to a target (hf.co/papers/2405.02774)."""

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from ..sinkhorn import exact_transport, sinkhorn

Floats = NDArray[np.float64]

SOLVERS = ("sinkhorn", "exact")


def calibrated_gradient(potentials: ArrayLike) -> Floats:
    """
    Derivative of the transport cost when mass moves to an example, taken evenly from all others, `(N,)`.

    `c_i = f_i - mean of f over the others` (LAVA, hf.co/papers/2305.00054, section 3.2); negative = more of this
    example brings the data closer to the target.

    Args:
        potentials (`array` of shape `(N,)`):
            Dual potentials of the examples, up to a constant. NaN stays NaN, and counts for none of the others.
    """
    f = np.asarray(potentials, dtype=np.float64)
    known = np.isfinite(f)
    count = int(known.sum())
    if count < 2:
        return np.where(known, 0.0, np.nan)
    return np.where(known, (count * f - f[known].sum()) / (count - 1), np.nan)


def target_gradient(
    candidates: ArrayLike,
    target: ArrayLike,
    *,
    solver: str = "sinkhorn",
    metric: str = "cosine",
    device: str | torch.device = "cpu",
) -> Floats:
    """
    Calibrated gradients of the optimal transport from the candidates to the target (hf.co/papers/2405.02774, eq. 4).

    Args:
        candidates (`array` of shape `(N, d)`):
            Embeddings of the candidates. Where one is not finite, its gradient is NaN, and it takes part in nothing.
        target (`array` of shape `(M, d)`):
            Embeddings of the target; those that are not finite are left out.
        solver (`str`, *optional*, defaults to `"sinkhorn"`):
            `"sinkhorn"`, or `"exact"` for small sets (needs POT).
        metric (`str`, *optional*, defaults to `"cosine"`):
            See [`~dsel_trl.functional.sinkhorn.cost_matrix`].
        device (*optional*, defaults to the CPU):
            Where to compute.

    Returns:
        `array` of shape `(N,)`: negative = train it to come closer to the target; take the smallest. For a set to stay
        away from take the largest.

    Raises:
        `ValueError`: for an unknown solver, or if nothing in one of the sets is finite.
        `ImportError`: for `"exact"` without POT.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver={solver!r} is none of {list(SOLVERS)}.")
    rows, goal = (np.asarray(values) for values in (candidates, target))
    known, usable = np.isfinite(rows).all(axis=1), np.isfinite(goal).all(axis=1)
    if not known.any() or not usable.any():
        raise ValueError(f"No embedding of the {'target' if known.any() else 'candidates'} is finite.")
    # A copy of all candidates is made only where some of them have to go.
    kept, wanted = (values if mask.all() else values[mask] for values, mask in ((rows, known), (goal, usable)))
    solve = exact_transport if solver == "exact" else sinkhorn
    found = solve(torch.as_tensor(kept, device=device), torch.as_tensor(wanted, device=device), metric=metric)
    f = np.full(len(rows), np.nan)
    f[known] = found.f
    return calibrated_gradient(f)
