"""Dr. DPO: down-weights the pairs of a batch with the largest losses (https://hf.co/papers/2407.07880)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..margins import upcast


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
    if math.isinf(beta_prime):
        return losses.mean()
    return -beta_prime * (torch.logsumexp(-losses / beta_prime, dim=0) - math.log(max(losses.numel(), 1)))


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
    losses = upcast(losses.detach())
    valid = torch.isfinite(losses)
    weights = torch.zeros_like(losses)
    weights[valid] = torch.softmax(-losses[valid] / beta_prime, dim=0)
    return weights * valid.sum() if normalize == "mean1" else weights


@dataclass(frozen=True)
class LogMeanExp:
    """
    Running `log mean exp(-l / b)` over micro-batches, so that gradient accumulation approaches the full batch.

    Args:
        log_sum (`float`, *optional*, defaults to `-inf`):
            Logarithm of the (decayed) sum of `exp(-l / b)`.
        count (`float`, *optional*, defaults to `0.0`):
            (Decayed) number of losses behind it.
    """

    log_sum: float = -math.inf
    count: float = 0.0


def log_mean_exp_update(state: LogMeanExp, losses: Tensor, beta_prime: float = 1.0, decay: float = 1.0) -> LogMeanExp:
    """
    Takes one micro-batch into the running log-mean-exp.

    Args:
        state (`LogMeanExp`):
            State before the micro-batch.
        losses (`torch.Tensor` of shape `(b,)`):
            DPO losses; non-finite ones are left out.
        beta_prime (`float`, *optional*, defaults to `1.0`):
            Temperature.
        decay (`float`, *optional*, defaults to `1.0`):
            Factor on what was seen before; 1 = the exact value over all micro-batches since the state was made.

    Returns:
        `LogMeanExp`.
    """
    _check_temperature(beta_prime)
    losses = upcast(losses.detach())
    scaled = -losses[torch.isfinite(losses)].cpu().double() / beta_prime
    if scaled.numel() == 0:
        return state
    old = state.log_sum + math.log(decay) if decay > 0 else -math.inf
    log_sum = torch.logaddexp(torch.logsumexp(scaled, dim=0), scaled.new_tensor(old))
    return LogMeanExp(float(log_sum), decay * state.count + scaled.numel())


def running_dr_dpo_weights(state: LogMeanExp, losses: Tensor, beta_prime: float = 1.0) -> Tensor:
    """
    Weights `exp(-l / b) / running mean exp(-l / b)` of a micro-batch whose losses are already in `state`.

    Returns:
        `torch.Tensor` of shape `(b,)`, detached; equal to [`dr_dpo_weights`] if the state has seen this batch only.
    """
    losses = upcast(losses.detach())
    if state.count == 0:
        return torch.ones_like(losses)
    weights = torch.exp(-losses / beta_prime - (state.log_sum - math.log(state.count)))
    return torch.where(torch.isfinite(losses), weights, 0.0)
