"""EL2N: how far the predicted distribution is from the label (https://hf.co/papers/2107.07075, definition 2)."""

import math

import torch
from torch import Tensor

from ..margins import upcast


def token_el2n(logps: Tensor, log_sum_sq_probs: Tensor) -> Tensor:
    """
    Distance `|p - onehot(y)|_2` of each token's distribution from its label, without the distribution itself.

    `|p - onehot(y)|^2 = sum_v p(v)^2 - 2 p(y) + 1`: two numbers per token say it.

    Args:
        logps (`torch.Tensor`):
            Log-probability of each label.
        log_sum_sq_probs (`torch.Tensor` of the same shape):
            `log sum_v p(v)^2` at the same positions, as
            [`~dsel_trl.functional.preference.wpo.log_sum_squared_probs`] gives it.

    Returns:
        `torch.Tensor` of the same shape, in float32 or better, in [0, sqrt(2)].
    """
    squared = torch.exp(upcast(log_sum_sq_probs)) - 2 * torch.exp(upcast(logps)) + 1
    # Below zero by rounding only, where the label is certain.
    return squared.clamp(min=0).sqrt()


def token_mean(values: Tensor, mask: Tensor) -> Tensor:
    """
    Mean of per-token values over the tokens that count of each sequence.

    Args:
        values (`torch.Tensor` of shape `(rows, T)`):
            Such as distances from [`token_el2n`], or log-probabilities.
        mask (`torch.Tensor` of shape `(rows, T)`):
            The tokens that count: those that carry loss.

    Returns:
        `torch.Tensor` of shape `(rows,)`; NaN for a sequence without one.
    """
    total = torch.where(mask.bool(), values, 0.0).sum(dim=-1)
    count = mask.sum(dim=-1)
    return torch.where(count > 0, total / count.clamp(min=1), torch.nan)


def pair_el2n(margin: Tensor) -> Tensor:
    """
    The same of a preference pair, taken for a choice between two with probability `sigmoid(margin)` of the right one.

    Args:
        margin (`torch.Tensor` of shape `(B,)`):
            Reward margin, scaled by beta.

    Returns:
        `torch.Tensor` of shape `(B,)`, in float32 or better: `sqrt(2) * (1 - sigmoid(margin))`.
    """
    return math.sqrt(2) * torch.sigmoid(-upcast(margin))
