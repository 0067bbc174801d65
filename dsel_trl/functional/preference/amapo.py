"""AMaPO: pairs below the batch's mean margin get a target margin of their own (https://hf.co/papers/2511.09385).

All log-probabilities are per-token averages ([`~margins.average_logps`]); mean and deviation are those of the global
batch.
"""

import math

import torch
from torch import Tensor

from ..margins import dpo_loss, upcast
from ..running import batch_moments
from ..weighting import length_normalized_gate_rows, slopes


def amapo_margin(average_gap: Tensor, beta: float = 3.0, max_exponent: float | None = 10.0) -> Tensor:
    """
    Target margin `beta * exp(((mu - u) / sd) * mu)` of the pairs with `u < mu`, 0 for the others.

    With a negative mean the exponent is negative: then the weaker a pair, the smaller its margin, as in the reference.

    Args:
        average_gap (`torch.Tensor` of shape `(B,)`):
            `u = alp_w - alp_l` of the global batch.
        beta (`float`, *optional*, defaults to `3.0`):
            Scale of the margin.
        max_exponent (`float`, *optional*, defaults to `10.0`):
            Largest exponent; `None` = no limit, as in the reference.

    Returns:
        `torch.Tensor` of shape `(B,)`, detached; all 0 in a constant batch or a batch of one.
    """
    gap = upcast(average_gap.detach())
    mean, std = batch_moments(gap)
    if math.isnan(std) or std == 0:
        return torch.zeros_like(gap)
    exponent = (mean - gap) / std * mean
    if max_exponent is not None:
        exponent = exponent.clamp(max=max_exponent)
    return torch.where(gap < mean, beta * torch.exp(exponent), 0.0)


def amapo_loss(average_gap: Tensor, margin: Tensor, beta: float = 3.0) -> Tensor:
    """
    Loss of each pair, `softplus(-(beta * u - g))`, shape `(B,)`, not reduced.

    Args:
        average_gap (`torch.Tensor` of shape `(B,)`):
            `u = alp_w - alp_l`.
        margin (`torch.Tensor` of shape `(B,)`):
            From [`amapo_margin`].
        beta (`float`, *optional*, defaults to `3.0`):
            Scale of the margin.
    """
    return dpo_loss(beta * upcast(average_gap) - margin.detach())


def amapo_gate_rows(
    average_gap: Tensor,
    margin: Tensor,
    beta: float,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    stock_margin: Tensor,
    stock_beta: float,
) -> Tensor:
    """
    Row factors that turn the gradient of TRL's DPO sigmoid loss into that of [`amapo_loss`]. Exact, per row: averages
    divide each side by its own length.

    Args:
        average_gap, margin, beta:
            As in [`amapo_loss`].
        chosen_lengths (`torch.Tensor` of shape `(B,)`), rejected_lengths (`torch.Tensor` of shape `(B,)`):
            Numbers of scored completion tokens.
        stock_margin (`torch.Tensor` of shape `(B,)`), stock_beta (`float`):
            Implicit margin (sums, beta included) and beta of the stock loss.

    Returns:
        `torch.Tensor` of shape `(2B,)`, detached, chosen rows first. Never normalise it.
    """
    slope = -slopes(lambda gap: amapo_loss(gap, margin, beta), average_gap)[0]
    return length_normalized_gate_rows(slope, slope, chosen_lengths, rejected_lengths, stock_margin, stock_beta)
