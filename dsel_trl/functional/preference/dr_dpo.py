"""Dr. DPO: down-weights the pairs of a batch with the largest losses (https://hf.co/papers/2407.07880)."""

import math

import torch
from torch import Tensor

from ..margins import upcast
from ..weighting import slopes


def _check_temperature(beta_prime: float) -> None:
    if not beta_prime > 0:
        raise ValueError(f"beta_prime must be positive, but is {beta_prime}")


def dr_dpo_aggregate(losses: Tensor, beta_prime: float = 1.0, literal: bool = False) -> Tensor:
    """
    Aggregated loss of a batch, `-b * log(mean_i exp(-l_i / b))`.

    Args:
        losses (`torch.Tensor` of shape `(B,)`):
            DPO losses of the global batch; non-finite ones are left out.
        beta_prime (`float`, *optional*, defaults to `1.0`):
            Temperature b: infinity gives the mean, towards 0 only the best fitted pairs count.
        literal (`bool`, *optional*, defaults to `False`):
            Evaluates the expression as it is written, which gives infinity when all losses are large.

    Returns:
        `torch.Tensor` scalar.

    Raises:
        `ValueError`: if `beta_prime` is not positive.
    """
    _check_temperature(beta_prime)
    losses = upcast(losses)
    losses = losses[torch.isfinite(losses)]
    if literal:
        return -beta_prime * torch.log(torch.exp(-losses / beta_prime).mean())
    if math.isinf(beta_prime) or losses.numel() == 0:
        return losses.mean()
    scaled = -losses / beta_prime
    # Not by logsumexp: equal losses must weigh exactly alike.
    largest = scaled.max().detach()
    return -beta_prime * (largest + torch.log(torch.exp(scaled - largest).mean()))


def dr_dpo_weights(losses: Tensor, beta_prime: float = 1.0, normalize: str = "mean1") -> Tensor:
    """
    Weight of each pair, `B * softmax(-l / b)`: the mean of `weight * loss` has exactly the gradient of
    [`dr_dpo_aggregate`], so as a gate weight it is exact.

    Args:
        losses (`torch.Tensor` of shape `(B,)`):
            DPO losses of the global batch; non-finite ones get weight 0.
        beta_prime (`float`, *optional*, defaults to `1.0`):
            Temperature b.
        normalize (`str`, *optional*, defaults to `"mean1"`):
            `"mean1"`: the weights average 1 over the pairs with a finite loss; `"sum1"`: they sum to 1.

    Returns:
        `torch.Tensor` of shape `(B,)`, detached.

    Raises:
        `ValueError`: if `beta_prime` is not positive or `normalize` is unknown.
    """
    _check_temperature(beta_prime)
    if normalize not in ("mean1", "sum1"):
        raise ValueError(f'normalize must be "mean1" or "sum1", but is {normalize!r}')
    weights = slopes(lambda values: dr_dpo_aggregate(values, beta_prime), losses)[0]
    return weights * torch.isfinite(losses).sum() if normalize == "mean1" else weights
