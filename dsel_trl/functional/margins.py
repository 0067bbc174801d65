"""Quantities of preference pairs: log-ratio margins, implicit and explicit margins, and the DPO loss.

`B` is the number of pairs. Sequence log-probabilities are sums over the completion tokens, shape `(B,)`; inputs in
half precision are computed in float32. Everything here is differentiable.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def upcast(values: Tensor) -> Tensor:
    """Float32, or float64 where it was given: margins are differences of large numbers."""
    return values if values.dtype == torch.float64 else values.float()


def average_logps(logps: Tensor, lengths: Tensor) -> Tensor:
    """
    Per-token average log-probabilities.

    Args:
        logps (`torch.Tensor` of shape `(B,)`):
            Summed log-probabilities of the completions.
        lengths (`torch.Tensor` of shape `(B,)`):
            Number of scored completion tokens. An empty completion counts as length 1, so its average is 0.

    Returns:
        `torch.Tensor` of shape `(B,)`.
    """
    return upcast(logps) / lengths.clamp(min=1)


def valid_pairs(chosen_lengths: Tensor, rejected_lengths: Tensor) -> Tensor:
    """Boolean `(B,)`: `False` where truncation left a completion without a token, so that the pair says nothing."""
    return (chosen_lengths > 0) & (rejected_lengths > 0)


def log_ratio_margin(
    policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor
) -> Tensor:
    """
    Log-ratio margin `h = (lp_w - rp_w) - (lp_l - rp_l)`, not scaled by beta.

    Args:
        policy_chosen (`torch.Tensor` of shape `(B,)`), policy_rejected (`torch.Tensor` of shape `(B,)`):
            Log-probabilities under the policy: sums for the DPO form, averages for length-normalised forms.
        ref_chosen (`torch.Tensor` of shape `(B,)`), ref_rejected (`torch.Tensor` of shape `(B,)`):
            The same under the reference model.

    Returns:
        `torch.Tensor` of shape `(B,)`.
    """
    return (upcast(policy_chosen) - upcast(ref_chosen)) - (upcast(policy_rejected) - upcast(ref_rejected))


def implicit_margin(
    policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float
) -> Tensor:
    """
    Implicit reward margin of DPO, `m = beta * h` ([`log_ratio_margin`]). See https://hf.co/papers/2305.18290, equation
    5.

    Args:
        policy_chosen, policy_rejected, ref_chosen, ref_rejected (`torch.Tensor` of shape `(B,)`):
            Summed log-probabilities.
        beta (`float`):
            DPO's temperature.

    Returns:
        `torch.Tensor` of shape `(B,)`.
    """
    return beta * log_ratio_margin(policy_chosen, policy_rejected, ref_chosen, ref_rejected)


def simpo_margin(average_chosen: Tensor, average_rejected: Tensor, beta: float) -> Tensor:
    """
    Reference-free implicit margin of SimPO, `beta * (alp_w - alp_l)`, from per-token averages ([`average_logps`]). Its
    target margin is a constant shift and no part of it. See https://hf.co/papers/2405.14734.
    """
    return beta * (upcast(average_chosen) - upcast(average_rejected))


def explicit_margin(chosen_scores: Tensor, rejected_scores: Tensor) -> Tensor:
    """Explicit margin `d = r_w - r_l` of an external reward or judge, shape `(B,)`; NaN where a score is missing."""
    return upcast(chosen_scores) - upcast(rejected_scores)


def dpo_loss(margin: Tensor) -> Tensor:
    """
    DPO loss of each pair, `-log sigmoid(m)`, stable for any margin.

    Args:
        margin (`torch.Tensor` of shape `(B,)`):
            Implicit reward margin, beta included.

    Returns:
        `torch.Tensor` of shape `(B,)`, not reduced.
    """
    return -F.logsigmoid(upcast(margin))
