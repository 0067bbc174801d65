"""beta-DPO: keeps the usual pairs of a batch and scales beta by their margins (https://hf.co/papers/2407.08639).

The margins are unscaled log-ratio margins `h`. Per step: update the moving averages ([`~running.ema_update`]), draw
the pairs to keep, compute the beta of the batch. All statistics are those of the global batch.
"""

import torch
from torch import Tensor

from ..margins import upcast
from ..ranking import keep_count


def log_keep_weights(margin: Tensor, mean: float, std: float) -> Tensor:
    """
    Logarithm of the Gaussian keep-weights, `-((h - M) / S)^2 / 2`.

    Args:
        margin (`torch.Tensor` of shape `(B,)`):
            Log-ratio margins of the global batch.
        mean (`float`), std (`float`):
            Moving averages M and S. If S is not positive there is nothing to compare with: all weights are equal.

    Returns:
        `torch.Tensor` of shape `(B,)`, detached; `-inf` where the margin is not finite.
    """
    margin = upcast(margin.detach())
    log_weights = -0.5 * ((margin - mean) / std) ** 2 if std > 0 else torch.zeros_like(margin)
    return torch.where(torch.isfinite(margin), log_weights, -torch.inf)


def kept_pairs(batch_size: int, filter_ratio: float) -> int:
    """
    Number of pairs to keep, `floor(B * (1 - filter_ratio))`, at least 1.

    Raises:
        `ValueError`: if `filter_ratio` is not in [0, 1).
    """
    if not 0 <= filter_ratio < 1:
        raise ValueError(f"filter_ratio must be in [0, 1), but is {filter_ratio}")
    return keep_count(1 - filter_ratio, batch_size)


def draw_mask(log_weights: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """
    Draws `k` pairs without replacement with probabilities proportional to their keep-weights.

    The draw works on the logarithms (Gumbel noise, largest `k`), so it needs no floor against underflow: when all
    weights but a few are 0 in float32, the pairs nearest to the mean are drawn.

    Args:
        log_weights (`torch.Tensor` of shape `(B,)`):
            From [`log_keep_weights`].
        k (`int`):
            Number of pairs to keep; pairs with a non-finite margin are never kept.
        generator (`torch.Generator`):
            Seeded alike on all ranks.

    Returns:
        `torch.Tensor` of shape `(B,)`: 1 where kept, 0 elsewhere.
    """
    uniform = torch.rand(log_weights.shape, generator=generator, device=generator.device, dtype=torch.float64)
    noise = -torch.log(-torch.log(uniform.clamp(min=torch.finfo(torch.float64).tiny)))
    # On the CPU: not every device knows float64.
    keys = log_weights.cpu().double() + noise.cpu()
    first = keys.argsort(descending=True, stable=True)[:k].to(log_weights.device)
    mask = torch.zeros_like(log_weights)
    mask[first] = 1.0
    return torch.where(torch.isfinite(log_weights), mask, 0.0)


def batch_beta(
    margin: Tensor, mask: Tensor, mean: float, std: float, beta: float = 0.1, a: float = 0.6, floor: float = 1e-3
) -> float:
    """
    Beta of a batch, `max(beta * (1 + a * (mean of the kept margins - M)), floor)`.

    Args:
        margin (`torch.Tensor` of shape `(B,)`):
            Log-ratio margins of the global batch.
        mask (`torch.Tensor` of shape `(B,)`):
            1 where the pair is kept.
        mean (`float`), std (`float`):
            Moving averages M and S.
        beta (`float`, *optional*, defaults to `0.1`):
            The base beta.
        a (`float`, *optional*, defaults to `0.6`):
            How far beta follows the margins. These are sums over tokens, so long completions want a smaller value.
        floor (`float`, *optional*, defaults to `1e-3`):
            Smallest beta.

    Returns:
        `float`: the base beta if nothing is kept, or there is nothing to compare with: fewer than two finite margins,
        or an S that is not positive.
    """
    margin = upcast(margin.detach())
    kept = margin[mask > 0]
    if kept.numel() == 0 or int(torch.isfinite(margin).sum()) < 2 or not std > 0:
        return beta
    return max(beta * (1 + a * (float(kept.mean()) - mean)), floor)


def kept_mean_weights(mask: Tensor) -> Tensor:
    """
    Weights with which the mean over a batch is the mean over its kept pairs, `mask * B / max(sum(mask), 1)`.

    Args:
        mask (`torch.Tensor` of shape `(B,)`):
            1 where the pair is kept.

    Returns:
        `torch.Tensor` of shape `(B,)`. It holds the division by the number of kept pairs: do not normalise it.
    """
    return mask * (mask.numel() / mask.sum().clamp(min=1))
