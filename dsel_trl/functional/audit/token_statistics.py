"""What the token log-probabilities of one response say of it, as a row of numbers."""

import torch
from torch import Tensor

QUANTILES = (0.0, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9)
# Of the surprise and of the rank, only the upper tail is told.
TAIL = (0.5, 0.9, 0.95)
NAMES = (
    "sum",
    "mean",
    "length",
    "log_length",
    "alone_sum",
    "alone_mean",
    "gain_sum",
    "gain_mean",
    "spread",
    "entropy",
    "entropy_spread",
    "surprise",
    "surprise_spread",
    "top1",
    "rank",
    "gain_spread",
    "first",
    "last",
    "gain_first",
    "opening",
    "jump",
    "trend",
    *(f"quantile_{q:g}" for q in QUANTILES),
    *(f"gain_quantile_{q:g}" for q in QUANTILES),
    *(f"surprise_quantile_{q:g}" for q in TAIL),
    *(f"rank_quantile_{q:g}" for q in TAIL),
)
# Tokens that count as the beginning of a response.
OPENING = 4


def token_values(logits: Tensor, tokens: Tensor) -> Tensor:
    """
    Log-probability, entropy, top-1 and log-rank of tokens under the distributions they were drawn from.

    Args:
        logits (`torch.Tensor` of shape `(T, V)`):
            Logits at the place before each token; upcast to float32.
        tokens (`torch.Tensor` of shape `(T,)`, int64):
            The tokens.

    Returns:
        `torch.Tensor` of shape `(4, T)`, float32: nats, nats, 0 or 1, `log(1 + tokens that are likelier)`.
    """
    logps = logits.float().log_softmax(-1)
    own = logps.gather(-1, tokens[:, None])
    # A logit of -inf has no share in the entropy.
    entropy = -(logps.exp() * logps).nan_to_num(nan=0.0).sum(-1)
    likelier = (logps > own).sum(-1)
    return torch.stack([own[:, 0], entropy, (likelier == 0).float(), torch.log1p(likelier.float())])


def response_statistics(given: Tensor, alone: Tensor) -> Tensor:
    """
    Statistics of one response, in the order of `NAMES`.

    Args:
        given (`torch.Tensor` of shape `(4, T)`):
            [`token_values`] of its tokens behind the prompt.
        alone (`torch.Tensor` of shape `(T,)`):
            Log-probabilities of the same tokens without the prompt.

    Returns:
        `torch.Tensor` of shape `(len(NAMES),)`, float32; NaN for a response without a token.
    """
    logps, entropy, top, rank = given
    size = logps.numel()
    if size == 0:
        return torch.full((len(NAMES),), torch.nan, device=logps.device)
    gain, surprise = logps - alone, -logps - entropy
    half = size // 2
    first, second = logps[: max(half, 1)].mean(), logps[half:].mean()
    length = torch.tensor(float(size), device=logps.device)
    jump = (logps[1:] - logps[:-1]).abs().mean() if size > 1 else torch.zeros_like(first)
    single = [
        logps.sum(),
        logps.mean(),
        length,
        length.log(),
        alone.sum(),
        alone.mean(),
        gain.sum(),
        gain.mean(),
        logps.std(correction=0),
        entropy.mean(),
        entropy.std(correction=0),
        surprise.mean(),
        surprise.std(correction=0),
        top.mean(),
        rank.mean(),
        gain.std(correction=0),
        logps[0],
        logps[-1],
        gain[:OPENING].mean(),
        logps[:OPENING].mean(),
        jump,
        second - first,
    ]
    levels, tail = torch.tensor(QUANTILES, device=logps.device), torch.tensor(TAIL, device=logps.device)
    parts = [logps.quantile(levels), gain.quantile(levels), surprise.quantile(tail), rank.quantile(tail)]
    return torch.cat([torch.stack(single), *parts])
