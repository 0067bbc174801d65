"""A micro-batch of sequences."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from .batch import ROW_LENGTHS, Batch


@dataclass
class SequenceBatch(Batch):
    """A micro-batch of sequences (SFT): one row each, or all of them in one row when training is padding-free."""

    @cached_property
    def token_mask(self) -> Tensor:
        """Tokens that carry loss, `(rows, T)` bool, aligned with the log-probabilities."""
        return self.inputs["labels"][:, 1:] != -100

    @cached_property
    def _segments(self) -> Tensor | None:
        """Example index of each label position in a flattened row, `(1, T)`; `None` when an example is a row."""
        lengths = self.inputs.get(ROW_LENGTHS)
        if lengths is None:
            return None
        # Not read off `position_ids`: they start anew for each document of a packed row, and with each padding token.
        positions = torch.arange(1, self.inputs["input_ids"].shape[1], device=lengths.device)
        return torch.searchsorted(lengths.cumsum(0), positions, right=True).clamp(max=self.size - 1)[None]

    def _per_example(self, values: Tensor) -> Tensor:
        if self._segments is None:
            return values.sum(dim=1)
        return torch.zeros(self.size, dtype=values.dtype, device=values.device).index_add_(
            0, self._segments[0], values[0]
        )

    def at_tokens(self, values: np.ndarray) -> Tensor:
        """One value per trained token, example after example, in the place of each, `(rows, T)`; 0 elsewhere."""
        placed = torch.zeros(self.token_mask.shape, device=self.token_mask.device)
        placed[self.token_mask] = torch.from_numpy(values).to(placed.device, placed.dtype)
        return placed

    @cached_property
    def token_logps(self) -> Tensor:
        """Log-probability of each label, `(rows, T)`; 0 where there is no loss."""
        return self.policy.log_probs[:, -self.token_mask.shape[1] :].float() * self.token_mask

    @cached_property
    def lengths(self) -> Tensor:
        """Tokens that carry loss, `(B,)`."""
        return self._per_example(self.token_mask.long())

    @cached_property
    def policy_logps(self) -> Tensor:
        """Summed log-probabilities of the trained tokens, `(B,)`."""
        return self._per_example(self.token_logps)

    @cached_property
    def loss(self) -> Tensor:
        """Mean negative log-likelihood of each example's trained tokens, `(B,)`."""
        return -self.policy_logps / self.lengths.clamp(min=1)

    def row_weights(self, weights: Tensor) -> Tensor:
        if weights.dim() > 1 or self._segments is None:
            return weights
        return weights[self._segments]

    def example_weights(self, weights: Tensor) -> Tensor:
        if weights.dim() == 1:
            return weights
        return self._per_example(weights * self.token_mask) / self.lengths.clamp(min=1)
