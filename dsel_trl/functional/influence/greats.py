"""GREATS: the part of a candidate batch that lowers a validation loss the most (NeurIPS 2024, algorithm 1)."""

import torch
from torch import Tensor

from ..ghost import exact


def step_terms(alignment: Tensor, interaction: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    """
    The two terms of the change of a validation loss that one step of SGD makes, with the identity for its Hessian.

    Args:
        alignment (`torch.Tensor` of shape `(n,)`):
            Product of each candidate's gradient with the mean validation gradient.
        interaction (`torch.Tensor` of shape `(n, n)`):
            Products of the candidates' gradients with each other.
        rate (`float`):
            Coefficient of each gradient in the step.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: `rate * alignment` and `rate^2 * interaction`.
    """
    return rate * exact(alignment), rate**2 * exact(interaction)


def direction_terms(alignment: Tensor, interaction: Tensor, target_norm: float, k: int) -> tuple[Tensor, Tensor]:
    """
    The same of gradients scaled to length 1: cosines, of which those among the candidates count `1 / k`.

    With usual learning rates the second term of a step is lost beside the first; this one is not.

    Args:
        alignment (`torch.Tensor` of shape `(n,)`), interaction (`torch.Tensor` of shape `(n, n)`):
            As in [`step_terms`].
        target_norm (`float`):
            Norm of the mean validation gradient.
        k (`int`):
            Candidates that will be chosen.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: cosines with the target, and with each other over `k`; 0 for a gradient
        that is zero.
    """
    interaction = exact(interaction)
    norms = interaction.diagonal().clamp(min=0).sqrt()
    inverse = torch.where(norms > 1e-12, 1 / norms.clamp(min=1e-12), 0.0)
    scaled = exact(alignment) * inverse / max(target_norm, 1e-12)
    return scaled, interaction * inverse * inverse.unsqueeze(1) / max(1, k)


def greedy_selection(scores: Tensor, interaction: Tensor, k: int) -> Tensor:
    """
    Chooses one after the other, each time the best once what the chosen ones have in common with it is taken off.

    Args:
        scores (`torch.Tensor` of shape `(n,)`):
            What each is worth alone; one that is not finite is chosen when nothing else is left.
        interaction (`torch.Tensor` of shape `(n, n)`):
            What two of them share; entries that are not finite count as 0.
        k (`int`):
            How many are chosen, clamped to [1, n]: also those that are worth less than nothing.

    Returns:
        `torch.Tensor` of shape `(k,)`, int64: positions in the order of the choice; of equals the lower one.
    """
    values = torch.where(torch.isfinite(scores), exact(scores), -torch.inf)
    shared = torch.nan_to_num(exact(interaction), nan=0.0, posinf=0.0, neginf=0.0)
    left = torch.ones(len(values), dtype=torch.bool, device=values.device)
    chosen = []
    for _ in range(min(max(1, k), len(values))):
        # Among equals `argmax` may give any; the first of the largest is the lowest position.
        best = values[left].max()
        position = int(torch.nonzero(left & (values == best))[0])
        chosen.append(position)
        left[position] = False
        values = values - shared[position]
    return torch.tensor(chosen, dtype=torch.int64)
