"""Losses and weights for preference labels of which a share is flipped (rDPO: https://hf.co/papers/2403.00409).

`u` is the implicit margin with beta, `eps` the probability that a label is flipped.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..margins import dpo_loss, upcast
from ..weighting import slope_gate_weight, slopes


def _check_flip_rate(eps: float) -> None:
    if not 0 <= eps < 0.5:
        raise ValueError(f"the flip rate must be in [0, 0.5), but is {eps}")


def robust_loss(margin: Tensor, eps: float = 0.1) -> Tensor:
    """
    rDPO, `((1 - eps) * softplus(-u) - eps * softplus(u)) / (1 - 2 * eps)`: unbiased for the loss on clean labels.

    Args:
        margin (`torch.Tensor` of shape `(B,)`):
            Implicit margin, beta included.
        eps (`float`, *optional*, defaults to `0.1`):
            Flip rate in [0, 0.5).

    Returns:
        `torch.Tensor` of shape `(B,)`, not reduced; can be negative.

    Raises:
        `ValueError`: if `eps` is not in [0, 0.5).
    """
    _check_flip_rate(eps)
    return ((1 - eps) * dpo_loss(margin) - eps * dpo_loss(-margin)) / (1 - 2 * eps)


def conservative_loss(margin: Tensor, eps: float = 0.1) -> Tensor:
    """
    cDPO (label smoothing), `(1 - eps) * softplus(-u) + eps * softplus(u)`: lowest at `u = log((1 - eps) / eps)`.
    Arguments and errors as in [`robust_loss`].
    """
    _check_flip_rate(eps)
    return (1 - eps) * dpo_loss(margin) + eps * dpo_loss(-margin)


def robust_gradient(margin: Tensor, eps: float = 0.1) -> Tensor:
    """Derivative of [`robust_loss`] by the margin, `(B,)`, detached: always negative, so margins keep growing."""
    return slopes(lambda u: robust_loss(u, eps), margin)[0]


def conservative_gradient(margin: Tensor, eps: float = 0.1) -> Tensor:
    """Derivative of [`conservative_loss`] by the margin, shape `(B,)`, detached."""
    return slopes(lambda u: conservative_loss(u, eps), margin)[0]


def robust_gate_weight(margin: Tensor, eps: float = 0.1) -> Tensor:
    """
    Factor per pair that turns the gradient of the DPO sigmoid loss into that of [`robust_loss`]. Exact. Shape `(B,)`,
    detached; grows like `exp(u)`, because rDPO still pushes where DPO has stopped.
    """
    return slope_gate_weight(-robust_gradient(margin, eps), margin)


def conservative_gate_weight(margin: Tensor, eps: float = 0.1) -> Tensor:
    """
    Factor per pair that turns the gradient of the DPO sigmoid loss into that of [`conservative_loss`]. Exact. Shape
    `(B,)`, detached; negative above the optimal margin `log((1 - eps) / eps)`.
    """
    return slope_gate_weight(-conservative_gradient(margin, eps), margin)


def clean_posterior(margin: Tensor, eps: float = 0.1) -> Tensor:
    """
    Probability that a label is right given the margin of the policy, a weight in [0, 1]:
    `(1 - eps) * sigmoid(u) / ((1 - eps) * sigmoid(u) + eps * sigmoid(-u))`.

    Use it once the policy has learned something: at `u = 0` it is `1 - eps` for every pair.

    Args:
        margin (`torch.Tensor` of shape `(B,)`):
            Implicit margin, beta included.
        eps (`float`, *optional*, defaults to `0.1`):
            Flip rate in [0, 0.5).

    Returns:
        `torch.Tensor` of shape `(B,)`, detached; 0 where the margin is NaN.

    Raises:
        `ValueError`: if `eps` is not in [0, 0.5).
    """
    _check_flip_rate(eps)
    u = upcast(margin.detach())
    if eps == 0:
        return torch.where(torch.isnan(u), 0.0, torch.ones_like(u))
    # The odds are (1 - eps) / eps * exp(u): a sigmoid, which cannot become 0/0.
    return torch.where(torch.isnan(u), 0.0, F.sigmoid(u + math.log((1 - eps) / eps)))


def estimate_flip_rate(posteriors: Tensor, low: float = 0.01, high: float = 0.45) -> float:
    """
    One EM step for the flip rate: `mean(1 - posterior)` over an epoch, clipped.

    Args:
        posteriors (`torch.Tensor` of shape `(n,)`):
            [`clean_posterior`] of the examples seen; non-finite entries are left out.
        low (`float`, *optional*, defaults to `0.01`), high (`float`, *optional*, defaults to `0.45`):
            Bounds of the estimate.

    Returns:
        `float` in [`low`, `high`].

    Raises:
        `ValueError`: if no posterior is finite.
    """
    finite = posteriors.detach()[torch.isfinite(posteriors)]
    if finite.numel() == 0:
        raise ValueError(f"no finite posterior among {posteriors.numel()}: the flip rate cannot be estimated")
    return min(max(float((1 - upcast(finite)).mean()), low), high)
