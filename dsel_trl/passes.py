"""Extra passes over the data: length-sorted, token-budgeted, sharded over the ranks, with a progress bar."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .tap import Batch


class Passes:
    """
    Runs examples through a model without training on them.

    Args:
        rows (`Callable[[np.ndarray], dict]`):
            Collates the examples of some ids, as the trainer would, on the training device.
        lengths (`np.ndarray` of shape `(N,)`):
            Padded cost of an example in tokens.
        forward (`Callable[..., Batch]`):
            Runs a collated batch through the policy (and the reference) without gradient, in evaluation mode.
        rank, world (`int`):
            This process and their number.
        total (`Callable[[Tensor], Tensor]`):
            Sum of a tensor over the ranks.
    """

    def __init__(
        self,
        rows: Callable[[np.ndarray], dict[str, Any]],
        lengths: np.ndarray,
        forward: Callable[..., Batch],
        rank: int = 0,
        world: int = 1,
        total: Callable[[Tensor], Tensor] = lambda values: values,
    ) -> None:
        self.rows = rows
        self.lengths = lengths
        self.forward = forward
        self.rank = rank
        self.world = world
        self.total = total

    def measure(
        self,
        measure: Callable[[Batch], Tensor],
        ids: np.ndarray | None = None,
        *,
        forward: Callable[..., Batch] | None = None,
        tokens: int = 8192,
        description: str = "Scoring",
    ) -> np.ndarray:
        """
        `measure(batch)` of every example of `ids` (all by default), `(len(ids),)` or `(len(ids), K)` float32.

        Args:
            measure (`Callable[[Batch], Tensor]`):
                Gives `(B,)` or `(B, K)` values of a scored batch.
            ids (`np.ndarray`, *optional*):
                Examples to measure, in any order; the result follows it.
            forward (`Callable[..., Batch]`, *optional*):
                Another forward, such as a helper model's.
            tokens (`int`, *optional*, defaults to `8192`):
                Padded tokens per batch.
            description (`str`, *optional*, defaults to `"Scoring"`):
                Text of the progress bar.

        Time: one forward per example (and one of the reference where a pair needs it); memory: one batch.
        """
        ids = np.arange(len(self.lengths)) if ids is None else np.asarray(ids, dtype=np.int64)
        if not len(ids):
            return np.empty(0, dtype=np.float32)
        batches = cut_by_tokens(self.lengths[ids], tokens)
        # Every rank runs as many forwards as the others, or a sharded model would wait for ever.
        rounds = -(-len(batches) // self.world)
        mine = [batches[min(turn * self.world + self.rank, len(batches) - 1)] for turn in range(rounds)]
        own = [turn * self.world + self.rank < len(batches) for turn in range(rounds)]
        result: np.ndarray | None = None
        for positions, counts in zip(tqdm(mine, desc=description, disable=self.rank > 0), own, strict=True):
            batch_ids = ids[positions]
            inputs = self.rows(batch_ids)
            values = measure((forward or self.forward)(inputs, torch.as_tensor(batch_ids))).float().cpu().numpy()
            if result is None:
                result = np.zeros((len(ids), *values.shape[1:]), dtype=np.float64)
            if counts:
                result[positions] = values
        assert result is not None
        if self.world > 1:
            result = self.total(torch.from_numpy(result)).cpu().numpy()
        return result.astype(np.float32)


def cut_by_tokens(lengths: np.ndarray, tokens: int) -> list[np.ndarray]:
    """
    Positions of `lengths` `(n,)` in batches of at most `tokens` padded tokens (at least one example), longest first.
    """
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    batches, start = [], 0
    while start < len(order):
        rows = max(1, tokens // max(1, int(lengths[order[start]])))
        batches.append(order[start : start + rows])
        start += rows
    return batches
