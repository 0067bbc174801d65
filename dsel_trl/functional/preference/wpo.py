"""WPO: weighs pairs by how likely the policy is to write them (https://hf.co/papers/2406.11827, equation 2)."""

import torch
from torch import Tensor

from ..margins import upcast


def token_logps(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> tuple[Tensor, Tensor]:
    """
    Log-probability of every label token under the logits one position before it.

    Args:
        logits (`torch.Tensor` of shape `(N, T, V)`):
            Model output.
        labels (`torch.Tensor` of shape `(N, T)`):
            Token ids, `ignore_index` outside the completion.
        ignore_index (`int`, *optional*, defaults to `-100`):
            Marks positions that are not scored.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: log-probabilities `(N, T-1)`, 0 where not scored, and the boolean mask.
    """
    targets = labels[:, 1:]
    mask = targets != ignore_index
    return torch.where(mask, target_logps(logits[:, :-1], targets.clamp(min=0)), 0.0), mask


def target_logps(logits: Tensor, targets: Tensor) -> Tensor:
    """
    Log-probability of each target under the logits at its own position.

    Args:
        logits (`torch.Tensor` of shape `(..., V)`):
            Model output.
        targets (`torch.Tensor` of shape `(...)`):
            Token ids.

    Returns:
        `torch.Tensor` of shape `(...)`, in float32 or better.
    """
    return upcast(logits).log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def log_sum_squared_probs(logits: Tensor) -> Tensor:
    """
    `log sum_v p(v)^2` of the next-token distribution, the log-probability that the policy expects of its own sample.

    Args:
        logits (`torch.Tensor` of shape `(..., V)`):
            Model output.

    Returns:
        `torch.Tensor` of shape `(...)`, in float32 or better.
    """
    # The logarithms of the probabilities first: logsumexp(2z) - 2 logsumexp(z) cancels where the logits are large.
    return torch.logsumexp(2 * upcast(logits).log_softmax(-1), dim=-1)


def token_entropy(logits: Tensor) -> Tensor:
    """
    Entropy of the next-token distribution.

    Args:
        logits (`torch.Tensor` of shape `(..., V)`):
            Model output.

    Returns:
        `torch.Tensor` of shape `(...)`, in nats, in float32 or better.
    """
    log_probs = upcast(logits).log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1)


def aligned_logps(logps: Tensor, expected_logps: Tensor, mask: Tensor) -> Tensor:
    """
    Mean aligned log-probability of each response, `A = mean_t (log p(y_t) - log sum_v p(v)^2)`.

    Args:
        logps (`torch.Tensor` of shape `(N, T)`):
            Token log-probabilities.
        expected_logps (`torch.Tensor` of shape `(N, T)`):
            [`log_sum_squared_probs`] at the same positions (sampled alignment), or the largest log-probability there
            (greedy alignment, never positive).
        mask (`torch.Tensor` of shape `(N, T)`):
            Completion positions.

    Returns:
        `torch.Tensor` of shape `(N,)`, detached; 0 for an empty completion.
    """
    difference = torch.where(mask.bool(), upcast(logps.detach()) - upcast(expected_logps.detach()), 0.0)
    return difference.sum(-1) / mask.sum(-1).clamp(min=1)


def wpo_pair_weight(aligned_chosen: Tensor, aligned_rejected: Tensor, cap: float | None = 1.0) -> Tensor:
    """
    Weight of each pair, `min(cap, exp(A_w + A_l))`: the mean of `weight * loss` is the loss, so as a gate weight it is
    exact.

    Args:
        aligned_chosen (`torch.Tensor` of shape `(B,)`), aligned_rejected (`torch.Tensor` of shape `(B,)`):
            From [`aligned_logps`].
        cap (`float`, *optional*, defaults to `1.0`):
            Largest weight of a pair, as in the authors' code. `None` gives TRL's `use_weighting`.

    Returns:
        `torch.Tensor` of shape `(B,)`, detached.
    """
    weight = torch.exp(aligned_chosen.detach() + aligned_rejected.detach())
    return weight if cap is None else weight.clamp(max=cap)
