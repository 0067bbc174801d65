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


def response_statistics(given: Tensor, alone: Tensor, sizes: Tensor) -> Tensor:
    """
    Statistics of responses, in the order of `NAMES`.

    Args:
        given (`torch.Tensor` of shape `(4, B, T)`):
            [`token_values`] of their tokens behind the prompt, each response from place 0 on; what stands behind its
            end is not read.
        alone (`torch.Tensor` of shape `(B, T)`):
            Log-probabilities of the same tokens without the prompt.
        sizes (`torch.Tensor` of shape `(B,)`, int64):
            Tokens of each response.

    Returns:
        `torch.Tensor` of shape `(B, len(NAMES))`, float32; NaN for a response without a token.
    """
    count, width = sizes[:, None], max(given.shape[-1], 1)
    places = torch.arange(width, device=sizes.device)
    own, half = places < count, count // 2
    if given.shape[-1] == 0:
        given, alone = given.new_zeros(*given.shape[:-1], 1), alone.new_zeros(len(sizes), 1)
    logps, entropy, top, rank = (values.masked_fill(~own, 0.0) for values in given)
    alone = alone.masked_fill(~own, 0.0)
    gain, surprise = logps - alone, -logps - entropy

    def mean(values: Tensor, mask: Tensor = own) -> Tensor:
        return (values * mask).sum(-1) / mask.sum(-1)

    def spread(values: Tensor) -> Tensor:
        return mean((values - mean(values)[:, None]).square()).sqrt()

    def quantiles(values: Tensor, levels: tuple[float, ...]) -> Tensor:
        ordered = values.masked_fill(~own, torch.inf).sort(-1).values
        place = torch.tensor(levels, device=values.device) * (count - 1).clamp(min=0)
        below = place.floor().long()
        low, high = ordered.gather(1, below), ordered.gather(1, place.ceil().long())
        return torch.where(below == place, low, torch.lerp(low, high, place - below))

    opening = own & (places < OPENING)
    jumps = (logps[:, 1:] - logps[:, :-1]).abs() * own[:, 1:]
    single = [
        logps.sum(-1),
        mean(logps),
        sizes.float(),
        sizes.float().log(),
        alone.sum(-1),
        mean(alone),
        gain.sum(-1),
        mean(gain),
        spread(logps),
        mean(entropy),
        spread(entropy),
        mean(surprise),
        spread(surprise),
        mean(top),
        mean(rank),
        spread(gain),
        logps[:, 0],
        logps.gather(1, (count - 1).clamp(min=0))[:, 0],
        mean(gain, opening),
        mean(logps, opening),
        jumps.sum(-1) / (sizes - 1).clamp(min=1),
        mean(logps, own & (places >= half)) - mean(logps, own & (places < half.clamp(min=1))),
    ]
    parts = [quantiles(logps, QUANTILES), quantiles(gain, QUANTILES), quantiles(surprise, TAIL), quantiles(rank, TAIL)]
    found = torch.cat([torch.stack(single, 1), *parts], 1)
    return found.masked_fill(count == 0, torch.nan)
