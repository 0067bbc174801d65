"""Labels of pairs that are wrong with a probability of their own: the DPO loss expected over both readings."""

import torch
from torch import Tensor

from ..margins import dpo_loss
from ..weighting import slope_gate_weight, slopes


def soft_label_loss(margin: Tensor, wrong: Tensor) -> Tensor:
    """
    `(1 - q) * softplus(-u) + q * softplus(u)`: label smoothing with a rate for each pair
    (hf.co/papers/2403.00409 has one for all).

    Args:
        margin (`torch.Tensor` of shape `(B,)`):
            Implicit margin `u`, beta included.
        wrong (`torch.Tensor` of shape `(B,)`):
            Probability `q` in [0, 1] that the label is wrong; 1 is the pair with its responses in each other's place.

    Returns:
        `torch.Tensor` of shape `(B,)`, not reduced.

    Raises:
        `ValueError`: if a probability is outside of [0, 1].
    """
    if wrong.numel() and not bool(((wrong >= 0) & (wrong <= 1)).all()):
        raise ValueError(f"probabilities of a wrong label lie in [0, 1], but there is {float(wrong.min())}")
    return (1 - wrong) * dpo_loss(margin) + wrong * dpo_loss(-margin)


def soft_label_gate_weight(margin: Tensor, wrong: Tensor) -> Tensor:
    """
    Factor per pair that turns the gradient of the DPO sigmoid loss into that of [`soft_label_loss`]. Exact. Shape
    `(B,)`, detached; negative where the margin exceeds what the label is worth; for `q = 1` it is `-exp(u)`.
    """
    (slope,) = slopes(lambda u: soft_label_loss(u, wrong), margin)
    factor: Tensor = torch.where(wrong == 0, 1.0, slope_gate_weight(-slope, margin))
    return factor
