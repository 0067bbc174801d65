"""gamma-PO: a target margin per pair, larger where the policy is sure, with a fixed mean (ACL 2025)."""

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ..margins import dpo_loss, upcast
from ..weighting import length_normalized_gate_rows, shifted_gate_weight, slopes

QUEUE_LENGTH = 2048
SET_SIZE = 256


@dataclass(frozen=True)
class GapQueue:
    """
    The latest reward gaps, oldest first: company for small batches.

    Args:
        gaps (`np.ndarray` of shape `(m,)`, *optional*, defaults to an empty array):
            Past gaps, at most `limit`.
        limit (`int`, *optional*, defaults to `2048`):
            Number of gaps that are remembered.
    """

    gaps: NDArray[np.float32] = field(default_factory=lambda: np.empty(0, dtype=np.float32))
    limit: int = QUEUE_LENGTH


def queue_push(queue: GapQueue, gaps: ArrayLike) -> GapQueue:
    """Appends the finite gaps of a batch and forgets the oldest beyond the limit."""
    new = np.asarray(gaps, dtype=np.float32)
    kept = np.concatenate([queue.gaps, new[np.isfinite(new)]])
    return GapQueue(kept[max(len(kept) - queue.limit, 0) :], queue.limit)


def queue_draw(
    queue: GapQueue, batch_size: int, rng: np.random.Generator, set_size: int = SET_SIZE
) -> NDArray[np.float32]:
    """Draws up to `set_size - batch_size` past gaps without replacement; none for a batch that is large enough."""
    count = min(max(set_size - batch_size, 0), len(queue.gaps))
    return rng.choice(queue.gaps, size=count, replace=False)


def target_margins(
    gaps: Tensor,
    gamma0: float,
    tau: float = 10.0,
    past_gaps: Tensor | None = None,
    iterations: int = 20,
    eps: float = 1e-10,
) -> Tensor:
    """
    Target margins `gamma_i = gamma0 * n * p_i`, where p minimises the mean loss plus `tau * KL(p || uniform)` by
    exponentiated gradient steps from the uniform distribution.

    Args:
        gaps (`torch.Tensor` of shape `(B,)`):
            Reward gaps: `beta * (alp_w - alp_l)` for SimPO, `beta * h` for DPO. Non-finite gaps take no part and get
            `gamma0`.
        gamma0 (`float`):
            Mean target margin, `gamma_ratio * beta`.
        tau (`float`, *optional*, defaults to `10.0`):
            Temperature; the larger, the nearer to one common margin.
        past_gaps (`torch.Tensor` of shape `(m,)`, *optional*):
            Gaps of earlier batches that join the set ([`queue_draw`]).
        iterations (`int`, *optional*, defaults to `20`):
            Number of steps. As in the reference, the margins are those at the start of the last step.
        eps (`float`, *optional*, defaults to `1e-10`):
            Guards the logarithm.

    Returns:
        `torch.Tensor` of shape `(B,)`, detached.

    Raises:
        `ValueError`: if `tau` is not positive or `iterations` is below 1.
    """
    if not tau > 0:
        raise ValueError(f"tau must be positive, but is {tau}")
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, but is {iterations}")
    batch = upcast(gaps.detach())
    together = batch if past_gaps is None else torch.cat([batch, past_gaps.detach().to(batch)])
    valid = torch.isfinite(together)
    # Float64: the steps build on each other, and the loss sees the difference of the gap and its margin. On the CPU,
    # as not every device knows float64 and the steps on so few values would cost more to launch than to compute.
    values = together[valid].cpu().double()
    n = values.numel()
    margins = torch.full_like(together, gamma0)
    if n == 0:
        return margins[: batch.numel()]
    step = min(0.5 / tau, 1.0)
    p = torch.full_like(values, 1.0 / n)
    for iteration in range(iterations):
        gamma = gamma0 * n * p
        if iteration == iterations - 1:
            break
        # gamma0 / (1 + exp(g - gamma)), written as a sigmoid so that large gaps do not overflow.
        slope = tau * (1 + torch.log(n * (p + eps))) + gamma0 * torch.sigmoid(gamma - values)
        p = torch.softmax(torch.log(p) - step * slope, dim=0)
    margins[valid] = gamma.to(margins)
    return margins[: batch.numel()]


def gamma_po_loss(gaps: Tensor, margins: Tensor, gamma0: float = 0.0) -> Tensor:
    """
    Loss of each pair, `softplus(-(g - (gamma - gamma0)))`.

    Args:
        gaps (`torch.Tensor` of shape `(B,)`):
            Reward gaps.
        margins (`torch.Tensor` of shape `(B,)`):
            From [`target_margins`].
        gamma0 (`float`, *optional*, defaults to `0.0`):
            0 for the SimPO form; the mean target margin for the DPO form, where only the deviation from it shifts.

    Returns:
        `torch.Tensor` of shape `(B,)`, not reduced.
    """
    return dpo_loss(upcast(gaps) - (margins.detach() - gamma0))


def gamma_po_gate_weight(gaps: Tensor, margins: Tensor, gamma0: float) -> Tensor:
    """
    DPO form: factor per pair that turns the gradient of the DPO sigmoid loss into that of [`gamma_po_loss`]. Exact,
    with `gaps` the implicit margins of the stock loss. Shape `(B,)`, detached.
    """
    return shifted_gate_weight(gaps, margins - gamma0)


def gamma_po_gate_rows(
    gaps: Tensor,
    margins: Tensor,
    beta: float,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    stock_margin: Tensor,
    stock_beta: float,
) -> Tensor:
    """
    SimPO form: row factors that turn the gradient of TRL's DPO sigmoid loss into that of [`gamma_po_loss`]. Exact, per
    row: SimPO divides each side by its own length.

    Args:
        gaps (`torch.Tensor` of shape `(B,)`), margins (`torch.Tensor` of shape `(B,)`):
            SimPO's reward gaps `beta * (alp_w - alp_l)` and their target margins.
        beta (`float`):
            Beta of the SimPO form.
        chosen_lengths (`torch.Tensor` of shape `(B,)`), rejected_lengths (`torch.Tensor` of shape `(B,)`):
            Numbers of scored completion tokens.
        stock_margin (`torch.Tensor` of shape `(B,)`), stock_beta (`float`):
            Implicit margin (beta included) and beta of the stock loss.

    Returns:
        `torch.Tensor` of shape `(2B,)`, detached, chosen rows first. Never normalise it.
    """
    slope = -beta * slopes(lambda g: gamma_po_loss(g, margins), gaps)[0]
    return length_normalized_gate_rows(slope, slope, chosen_lengths, rejected_lengths, stock_margin, stock_beta)
