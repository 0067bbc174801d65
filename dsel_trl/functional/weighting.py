"""Weights on examples: effective sample size, and the weights that turn one pair loss into another.

TRL's DPO sigmoid loss `-log sigmoid(m)` sends the gradient `-beta * sigmoid(-m)` into the chosen log-probability and
its negative into the rejected one. A loss of the same margin only changes the size of that number, so one factor per
pair reproduces its gradient exactly. A loss of per-token averages also divides each side by its own length: then the
chosen and the rejected row have factors of their own. Such factors are the loss itself, not an importance: never
normalise them.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .margins import upcast

# exp(80) is near the end of float32. A factor this large stands where the stock gradient has underflowed anyway.
MAX_LOG_FACTOR = 80.0


def effective_sample_size(weights: Tensor) -> Tensor:
    """
    Effective number of examples behind a weighted mean, `(sum w)^2 / sum w^2`.

    Args:
        weights (`torch.Tensor` of shape `(B,)`):
            Weights; non-finite ones count as 0.

    Returns:
        `torch.Tensor` scalar, in [1, B] for non-negative weights; 0 if all weights are 0.
    """
    scaled = upcast(weights.detach())
    scaled = torch.where(torch.isfinite(scaled), scaled, 0.0)
    # Dividing by the largest first keeps the squares of very large weights finite.
    scaled = scaled / scaled.abs().max().clamp(min=torch.finfo(scaled.dtype).tiny) if scaled.numel() else scaled
    squares = (scaled**2).sum()
    return torch.where(squares > 0, scaled.sum() ** 2 / torch.where(squares > 0, squares, 1.0), 0.0)


def slopes(losses: Callable[..., Tensor], *values: Tensor) -> tuple[Tensor, ...]:
    """
    Derivatives of losses, so that what trains is the formula of the loss itself, not a second one beside it.

    Args:
        losses (`Callable`):
            Loss of each pair, or of the batch, from `values`. What it treats as a constant is bound to it.
        values (`torch.Tensor` of shape `(B,)`):
            What the loss is differentiated by.

    Returns:
        `tuple[torch.Tensor, ...]`, one of shape `(B,)` per value, detached.
    """
    with torch.enable_grad():
        leaves = [upcast(value.detach()).requires_grad_() for value in values]
        return torch.autograd.grad(losses(*leaves).sum(), leaves)


def shifted_gate_weight(margin: Tensor, shift: Tensor | float) -> Tensor:
    """
    Factor that turns the gradient of `-log sigmoid(m)` into that of `-log sigmoid(m - shift)`. Exact, one per pair.

    Args:
        margin (`torch.Tensor` of shape `(B,)`):
            Implicit margin of the stock loss, beta included.
        shift (`torch.Tensor` of shape `(B,)` or `float`):
            Target margin, treated as a constant.

    Returns:
        `torch.Tensor` of shape `(B,)`, detached: `sigmoid(shift - m) / sigmoid(-m)`.
    """
    margin = upcast(margin.detach())
    shift = shift.detach() if isinstance(shift, Tensor) else shift
    return torch.exp((F.logsigmoid(shift - margin) - F.logsigmoid(-margin)).clamp(max=MAX_LOG_FACTOR))


def slope_gate_weight(slope: Tensor, stock_margin: Tensor) -> Tensor:
    """
    Factor that turns the gradient of `-log sigmoid(m)` into that of any loss `f(m)`. Exact, one per pair.

    Args:
        slope (`torch.Tensor` of shape `(B,)`):
            `-f'(m)`: how strongly the loss pushes the margin up.
        stock_margin (`torch.Tensor` of shape `(B,)`):
            Implicit margin of the stock loss, beta included.

    Returns:
        `torch.Tensor` of shape `(B,)`, detached: `slope / sigmoid(-m)`; negative where the loss pulls the margin down.
    """
    stock = F.logsigmoid(-upcast(stock_margin.detach()))
    return upcast(slope.detach()) * torch.exp((-stock).clamp(max=MAX_LOG_FACTOR))


def length_normalized_gate_rows(
    slope_chosen: Tensor,
    slope_rejected: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    stock_margin: Tensor,
    stock_beta: float,
) -> Tensor:
    """
    Row factors that turn the gradient of TRL's DPO sigmoid loss into that of a loss of per-token averages. Exact, one
    per row: no factor per pair can do it, because each side is divided by its own length.

    Args:
        slope_chosen (`torch.Tensor` of shape `(B,)`):
            Minus the derivative of the pair's loss by the average chosen log-probability.
        slope_rejected (`torch.Tensor` of shape `(B,)`):
            The derivative of the pair's loss by the average rejected log-probability.
        chosen_lengths (`torch.Tensor` of shape `(B,)`), rejected_lengths (`torch.Tensor` of shape `(B,)`):
            Numbers of scored completion tokens; 0 counts as 1.
        stock_margin (`torch.Tensor` of shape `(B,)`):
            Implicit margin of the stock loss, its beta included.
        stock_beta (`float`):
            Beta of the stock loss.

    Returns:
        `torch.Tensor` of shape `(2B,)`, detached: chosen rows first, as in TRL's batches.

    Raises:
        `ValueError`: if `stock_beta` is not positive.
    """
    if not stock_beta > 0:
        raise ValueError(f"the stock loss needs a positive beta, but got {stock_beta}")
    chosen = slope_gate_weight(slope_chosen, stock_margin) / chosen_lengths.clamp(min=1)
    rejected = slope_gate_weight(slope_rejected, stock_margin) / rejected_lengths.clamp(min=1)
    return torch.cat([chosen, rejected]) / stock_beta
