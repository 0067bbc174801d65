"""Uni-DPO: weighs pairs by judged quality and by what the policy still lacks (https://hf.co/papers/2506.10054).

All log-probabilities are per-token averages ([`~margins.average_logps`]).
"""

import torch
from torch import Tensor

from ..margins import dpo_loss, log_ratio_margin, upcast
from ..weighting import length_normalized_gate_rows, slopes


def quality_weight(chosen_scores: Tensor, rejected_scores: Tensor, eta: float = 0.7) -> Tensor:
    """Weight `sigmoid(eta * (s_w - s_l))` of the judged gap, shape `(B,)`, detached; 0.5 where a score is missing."""
    gap = (upcast(chosen_scores) - upcast(rejected_scores)).detach()
    return torch.where(torch.isfinite(gap), torch.sigmoid(eta * gap), 0.5)


def performance_weight(
    policy_chosen: Tensor, policy_rejected: Tensor, beta: float = 2.0, tau_ref: float = 0.8, gamma: float = 3.0
) -> Tensor:
    """
    Focal weight `(1 - sigmoid(beta * (alp_w - alp_l) - tau_ref))^gamma`: small once the policy separates the pair.

    Args:
        policy_chosen (`torch.Tensor` of shape `(B,)`), policy_rejected (`torch.Tensor` of shape `(B,)`):
            Average policy log-probabilities.
        beta (`float`, *optional*, defaults to `2.0`):
            Scale of the margin.
        tau_ref (`float`, *optional*, defaults to `0.8`):
            Margin at which a pair counts as learned by half.
        gamma (`float`, *optional*, defaults to `3.0`):
            Sharpness.

    Returns:
        `torch.Tensor` of shape `(B,)`. Differentiable: the reference implementation sends gradient through it.
    """
    return torch.sigmoid(tau_ref - beta * (upcast(policy_chosen) - upcast(policy_rejected))) ** gamma


def likelihood_indicator(
    policy_chosen: Tensor, ref_chosen: Tensor, chosen_scores: Tensor, tau_good: float = 3.2
) -> Tensor:
    """
    1 where a well judged chosen answer (`s_w >= tau_good`) has become less likely than under the reference (strictly),
    else 0; shape `(B,)`. A missing score gives 0.
    """
    return upcast((ref_chosen > policy_chosen) & (chosen_scores >= tau_good))


def uni_dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    *,
    beta: float = 2.0,
    eta: float = 0.7,
    tau_ref: float = 0.8,
    gamma: float = 3.0,
    nll_lambda: float = 0.001,
    tau_good: float = 3.2,
    detach_weight: bool = False,
) -> Tensor:
    """
    Uni-DPO loss of each pair, shape `(B,)`, not reduced.

    Args:
        policy_chosen, policy_rejected, ref_chosen, ref_rejected (`torch.Tensor` of shape `(B,)`):
            Average log-probabilities.
        chosen_scores (`torch.Tensor` of shape `(B,)`), rejected_scores (`torch.Tensor` of shape `(B,)`):
            Judge scores; NaN = missing.
        beta (`float`, *optional*, defaults to `2.0`):
            Scale of both margins; 2 to 10 in the paper.
        eta (`float`, *optional*, defaults to `0.7`):
            Scale of the judged gap.
        tau_ref (`float`, *optional*, defaults to `0.8`), gamma (`float`, *optional*, defaults to `3.0`):
            See [`performance_weight`].
        nll_lambda (`float`, *optional*, defaults to `0.001`):
            Weight of the likelihood term; 0.2 for mathematics.
        tau_good (`float`, *optional*, defaults to `3.2`):
            Score from which a chosen answer deserves the likelihood term; 8 for mathematics.
        detach_weight (`bool`, *optional*, defaults to `False`):
            Whether the performance weight is a constant (pure re-weighting) or carries gradient (reference).

    Returns:
        `torch.Tensor` of shape `(B,)`.
    """
    performance = performance_weight(policy_chosen, policy_rejected, beta, tau_ref, gamma)
    if detach_weight:
        performance = performance.detach()
    weight = quality_weight(chosen_scores, rejected_scores, eta) * performance
    margin = beta * log_ratio_margin(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    indicator = likelihood_indicator(policy_chosen, ref_chosen, chosen_scores, tau_good)
    return weight * dpo_loss(margin) - nll_lambda * indicator * upcast(policy_chosen)


def uni_dpo_gate_rows(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    stock_margin: Tensor,
    stock_beta: float,
    *,
    beta: float = 2.0,
    eta: float = 0.7,
    tau_ref: float = 0.8,
    gamma: float = 3.0,
    nll_lambda: float = 0.001,
    tau_good: float = 3.2,
    detach_weight: bool = False,
) -> Tensor:
    """
    Row factors that turn the gradient of TRL's DPO sigmoid loss into that of [`uni_dpo_loss`]. Exact, per row:
    averages and the likelihood term push the two sides with different strength, so no factor per pair can do it.

    Args:
        chosen_lengths (`torch.Tensor` of shape `(B,)`), rejected_lengths (`torch.Tensor` of shape `(B,)`):
            Numbers of completion tokens behind the averages.
        stock_margin (`torch.Tensor` of shape `(B,)`), stock_beta (`float`):
            Implicit margin (sums, beta included) and beta of the stock loss.

    The other arguments are those of [`uni_dpo_loss`].

    Returns:
        `torch.Tensor` of shape `(2B,)`, detached, chosen rows first. Never normalise it.
    """

    def losses(chosen: Tensor, rejected: Tensor) -> Tensor:
        return uni_dpo_loss(
            chosen,
            rejected,
            ref_chosen,
            ref_rejected,
            chosen_scores,
            rejected_scores,
            beta=beta,
            eta=eta,
            tau_ref=tau_ref,
            gamma=gamma,
            nll_lambda=nll_lambda,
            tau_good=tau_good,
            detach_weight=detach_weight,
        )

    chosen, rejected = slopes(losses, policy_chosen, policy_rejected)
    return length_normalized_gate_rows(-chosen, rejected, chosen_lengths, rejected_lengths, stock_margin, stock_beta)
