"""The stock DPO sigmoid loss on per-token log-probabilities, and its gradient behind given row factors."""

from dataclasses import dataclass

import torch

from dsel_trl.functional.margins import average_logps, log_ratio_margin


@dataclass
class PairBatch:
    """Six random pairs: token log-probabilities `(2B, T)` (chosen rows first), completion mask, reference sums."""

    tokens: torch.Tensor
    mask: torch.Tensor
    reference: torch.Tensor
    beta: float = 0.3

    @property
    def lengths(self):
        return self.mask.sum(-1).chunk(2)

    def sums(self, tokens=None):
        return ((self.tokens if tokens is None else tokens) * self.mask).sum(-1).chunk(2)

    def averages(self, tokens=None):
        return tuple(average_logps(s, n) for s, n in zip(self.sums(tokens), self.lengths, strict=True))

    def reference_averages(self):
        return tuple(average_logps(s, n) for s, n in zip(self.reference.chunk(2), self.lengths, strict=True))

    def margin(self, tokens=None):
        """Log-ratio margin `h`, not scaled."""
        return log_ratio_margin(*self.sums(tokens), *self.reference.chunk(2))

    def stock_gradient(self, weights):
        """Gradient of TRL's mean sigmoid loss by the token log-probabilities, each row multiplied by its factor."""
        tokens = self.tokens.clone().requires_grad_()
        (-torch.nn.functional.logsigmoid(self.beta * self.margin(tokens))).mean().backward()
        rows = weights if len(weights) == len(tokens) else torch.cat([weights, weights])
        return tokens.grad * rows[:, None]

    def gradient(self, loss):
        """Gradient of `loss(token log-probabilities)`."""
        tokens = self.tokens.clone().requires_grad_()
        loss(tokens).backward()
        return tokens.grad


def random_batch(seed=0, pairs=6, length=9):
    generator = torch.Generator().manual_seed(seed)
    tokens = -2 * torch.rand(2 * pairs, length, generator=generator, dtype=torch.float64)
    counts = torch.randint(2, length + 1, (2 * pairs,), generator=generator)
    mask = (torch.arange(length) < counts[:, None]).double()
    reference = (tokens * mask).sum(-1) + torch.randn(2 * pairs, generator=generator, dtype=torch.float64)
    return PairBatch(tokens, mask, reference)
