"""Losses of TRL's KTO training, one per response."""

import torch
from torch import Tensor

KTO_LOSSES = ("kto", "apo_zero_unpaired")


def kto_losses(
    loss_type: str,
    log_ratio: Tensor,
    desirable: Tensor,
    kl: float | Tensor = 0.0,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """
    Loss of each response, as TRL's `KTOTrainer` averages them.

    With `s = +1` for a desirable and `-1` for an undesirable response, and the weight of its side in front:
    `"kto"` is `1 - sigmoid(s * beta * (log_ratio - kl))` (hf.co/papers/2402.01306, Eqn. 7), `"apo_zero_unpaired"` is
    the same without the KL term (hf.co/papers/2408.06266). TRL takes the KL term out of the gradient, so a response's
    gradient is that of its own log-ratio alone.

    Args:
        loss_type (`str`):
            One of `KTO_LOSSES`.
        log_ratio (`torch.Tensor` of shape `(B,)`):
            Summed log-probability under the policy minus that under the reference, in nats.
        desirable (`torch.Tensor` of shape `(B,)`, bool):
            The labels.
        kl (`float` or `torch.Tensor` of shape `()`, *optional*, defaults to `0.0`):
            The batch's KL term, in nats.
        beta (`float`, *optional*, defaults to `0.1`):
            Scale of the log-ratios.
        desirable_weight, undesirable_weight (`float`, *optional*, defaults to `1.0`):
            Factors of the two sides.

    Returns:
        `torch.Tensor` of shape `(B,)`

    Raises:
        `ValueError`: for an unknown loss type.
    """
    if loss_type not in KTO_LOSSES:
        raise ValueError(f"loss_type={loss_type!r} is none of {list(KTO_LOSSES)}.")
    value = beta * (log_ratio - kl if loss_type == "kto" else log_ratio)
    weight = torch.where(desirable, desirable_weight, undesirable_weight)
    return weight * torch.sigmoid(torch.where(desirable, -value, value))
