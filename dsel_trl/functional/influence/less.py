"""LESS: low-rank gradient similarity under Adam (https://hf.co/papers/2402.04333)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ghost import exact


def adam_update(
    gradient: Tensor, first: Tensor, second: Tensor, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8
) -> Tensor:
    """
    The direction in which Adam would go for one example alone (section 3.1), as in the authors' code.

    `m' / sqrt(v' + eps)` with `m' = beta1 m + (1 - beta1) g` and `v' = beta2 v + (1 - beta2) g^2`: without bias
    correction, and with `eps` inside the root.

    Args:
        gradient (`torch.Tensor`):
            Gradients of examples, in whose last dimensions the moments are broadcast.
        first, second (`torch.Tensor`):
            Adam's moments as the optimizer keeps them.
        beta1, beta2, eps (`float`, *optional*, default to `0.9`, `0.999` and `1e-8`):
            Of the update.
    """
    gradient = exact(gradient)
    return (beta1 * first + (1 - beta1) * gradient) / (beta2 * second + (1 - beta2) * gradient.square() + eps).sqrt()


def unit(features: Tensor) -> Tensor:
    """Rows scaled to length 1, `(n, d)`; a zero row stays zero: sequences of all lengths count alike."""
    return torch.nn.functional.normalize(exact(features), dim=-1, eps=1e-12)


def influence(train: Tensor, target: Tensor) -> Tensor:
    """
    Cosine of each example's update with each target example's gradient, `(n, m)`, at one checkpoint.

    Args:
        train (`torch.Tensor` of shape `(n, d)`):
            Features of the examples' Adam updates.
        target (`torch.Tensor` of shape `(m, d)`):
            Features of the target's plain gradients, projected by the same signs.
    """
    return unit(train) @ unit(target).T


def rate_weights(rates: Sequence[float]) -> list[float]:
    """Weights of checkpoints by their learning rates, adding up to 1; equal ones where all rates are 0."""
    total = float(sum(rates))
    return [rate / total for rate in rates] if total > 0 else [1.0 / len(rates)] * len(rates)


def by_subtask(influences: Tensor, subtasks: Tensor) -> Tensor:
    """
    Mean influence on the target examples of each subtask, `(n, S)`.

    Args:
        influences (`torch.Tensor` of shape `(n, m)`):
            From [`influence`].
        subtasks (`torch.Tensor` of shape `(m,)`, int64):
            Subtask of each target example, from 0 on without gaps.
    """
    belongs = torch.nn.functional.one_hot(subtasks).to(influences.dtype)
    return influences @ (belongs / belongs.sum(dim=0))


def over_checkpoints(influences: Sequence[Tensor], rates: Sequence[float]) -> Tensor:
    """
    Influence over several checkpoints, each weighted by its learning rate (definition 3.1).

    Args:
        influences (`Sequence[torch.Tensor]`):
            Of each checkpoint, all of one shape.
        rates (`Sequence[float]`):
            Mean learning rate around each checkpoint.
    """
    return torch.stack([w * value for w, value in zip(rate_weights(rates), influences, strict=True)]).sum(dim=0)


def less_scores(influences: Tensor) -> Tensor:
    """The greatest influence on any subtask, `(n,)`, of `(n, S)`: an example has to help one of them, not all."""
    return influences.max(dim=1).values
