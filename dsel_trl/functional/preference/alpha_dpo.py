"""alpha-DPO: a target margin per pair that follows its margin over the reference (https://hf.co/papers/2410.10148).

All log-probabilities are per-token averages ([`~margins.average_logps`]). The moving averages are those of
[`~running.ema_update`] over `q`, updated before use and not during evaluation.
"""

import torch
from torch import Tensor

from ..margins import dpo_loss, upcast
from ..weighting import length_normalized_gate_rows, slopes


def alpha_margin(
    ratio_margin: Tensor, mean: float, std: float, alpha: float = 0.2, gamma_ratio: float = 0.6
) -> Tensor:
    """
    Target margin `c = alpha * (q - mean) / std + gamma_ratio`, in units of the average log-probability.

    Args:
        ratio_margin (`torch.Tensor` of shape `(B,)`):
            `q` of the global batch: the log-ratio margin of per-token averages.
        mean (`float`), std (`float`):
            Moving averages over the global batches.
        alpha (`float`, *optional*, defaults to `0.2`):
            How far the target follows the pair; 0 gives SimPO.
        gamma_ratio (`float`, *optional*, defaults to `0.6`):
            SimPO's target margin divided by beta.

    Returns:
        `torch.Tensor` of shape `(B,)`, detached; `gamma_ratio` where `q` is not finite, and for all pairs if there is
        nothing to compare with: fewer than two finite `q`, or a `std` that is not positive.
    """
    ratio_margin = upcast(ratio_margin.detach())
    if int(torch.isfinite(ratio_margin).sum()) < 2 or not std > 0:
        return torch.full_like(ratio_margin, gamma_ratio)
    shift = alpha * (ratio_margin - mean) / std + gamma_ratio
    return torch.where(torch.isfinite(shift), shift, gamma_ratio)


def alpha_dpo_loss(policy_chosen: Tensor, policy_rejected: Tensor, margin: Tensor, beta: float = 2.5) -> Tensor:
    """
    Loss of each pair, `softplus(-beta * ((alp_w - alp_l) - c))`.

    Args:
        policy_chosen (`torch.Tensor` of shape `(B,)`), policy_rejected (`torch.Tensor` of shape `(B,)`):
            Average policy log-probabilities.
        margin (`torch.Tensor` of shape `(B,)`):
            From [`alpha_margin`].
        beta (`float`, *optional*, defaults to `2.5`):
            Scale of the margin.

    Returns:
        `torch.Tensor` of shape `(B,)`, not reduced.
    """
    return dpo_loss(beta * ((upcast(policy_chosen) - upcast(policy_rejected)) - margin.detach()))


def alpha_dpo_gate_rows(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    margin: Tensor,
    beta: float,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    stock_margin: Tensor,
    stock_beta: float,
) -> Tensor:
    """
    Row factors that turn the gradient of TRL's DPO sigmoid loss into that of [`alpha_dpo_loss`]. Exact, per row:
    averages divide each side by its own length.

    Args:
        policy_chosen, policy_rejected, margin, beta:
            As in [`alpha_dpo_loss`].
        chosen_lengths (`torch.Tensor` of shape `(B,)`), rejected_lengths (`torch.Tensor` of shape `(B,)`):
            Numbers of scored completion tokens.
        stock_margin (`torch.Tensor` of shape `(B,)`), stock_beta (`float`):
            Implicit margin (sums, beta included) and beta of the stock loss.

    Returns:
        `torch.Tensor` of shape `(2B,)`, detached, chosen rows first. Never normalise it.
    """
    chosen, rejected = slopes(
        lambda first, second: alpha_dpo_loss(first, second, margin, beta), policy_chosen, policy_rejected
    )
    return length_normalized_gate_rows(-chosen, rejected, chosen_lengths, rejected_lengths, stock_margin, stock_beta)
