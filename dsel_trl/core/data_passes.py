"""Extra passes over the data: length-sorted, token-budgeted, sharded over the ranks, with a progress bar."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..data.rows import Rows
from ..signals.batch import Batch


class Passes:
    """
    Runs examples through a model without training on them.

    Args:
        rows (`Callable[[], Rows]`):
            Gives the rows that are measured where no others are named: the training set.
        forward (`Callable[..., Batch]`):
            Runs a collated batch through the policy (and the reference) without gradient, in evaluation mode.
        rank, world (`int`):
            This process and their number.
        total (`Callable[[Tensor], Tensor]`):
            Sum of a tensor over the ranks.
    """

    def __init__(
        self,
        rows: Callable[[], Rows],
        forward: Callable[..., Batch],
        rank: int = 0,
        world: int = 1,
        total: Callable[[Tensor], Tensor] = lambda values: values,
    ) -> None:
        self.rows = rows
        self.forward = forward
        self.rank = rank
        self.world = world
        self.total = total

    def measure(
        self,
        measure: Callable[[Any], Tensor],
        ids: np.ndarray | None = None,
        *,
        rows: Rows | None = None,
        inputs: Callable[[np.ndarray], Any] | None = None,
        lengths: np.ndarray | None = None,
        forward: Callable[..., Any] | None = None,
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
            rows ([`~dsel_trl.data.rows.Rows`], *optional*):
                Other rows than the training set.
            inputs (`Callable[[np.ndarray], Any]`, *optional*):
                Makes the inputs of some ids, instead of the trainer's collator: other prompts, single responses, or
                what is no example at all (then `lengths` says how many there are). Inputs that hold `labels` are
                scored as sequences, also where the trainer trains pairs.
            lengths (`np.ndarray`, *optional*):
                Padded cost in tokens by id, where it is not that of the rows.
            forward (`Callable[..., Batch]`, *optional*):
                Another forward, such as a helper model's.
            tokens (`int`, *optional*, defaults to `8192`):
                Padded tokens per batch.
            description (`str`, *optional*, defaults to `"Scoring"`):
                Text of the progress bar.

        Time: one forward per example (and one of the reference where a pair needs it); memory: one batch and the
        result. The batches, and so the numbers, do not depend on the number of processes.
        """
        lengths, inputs = self._measured(rows, lengths, inputs)
        ids = np.arange(len(lengths)) if ids is None else np.asarray(ids, dtype=np.int64)
        result: np.ndarray | None = None
        batches = self._batches(lengths, ids, inputs, forward, tokens, description)
        for positions, batch, counts in batches:
            values = measure(batch).float().cpu().numpy()
            if result is None:
                result = np.zeros((len(ids), *values.shape[1:]), dtype=np.float32)
            if counts:
                result[positions] = values
        return np.empty(0, dtype=np.float32) if result is None else self._summed(result)

    def measure_tokens(
        self,
        sizes: np.ndarray,
        *,
        rows: Rows | None = None,
        inputs: Callable[[np.ndarray], Any] | None = None,
        lengths: np.ndarray | None = None,
        forward: Callable[..., Any] | None = None,
        tokens: int = 8192,
        description: str = "Scoring tokens",
    ) -> np.ndarray:
        """
        Log-probability of every scored token of all examples, one example after another, `(sum(sizes),)` float32.

        Args:
            sizes (`np.ndarray` of shape `(N,)`):
                Scored tokens of each example.
            rows, inputs, lengths, forward, tokens, description:
                As in `measure`; the forward must give sequences.

        Raises:
            `ValueError`: if a batch has another number of scored tokens than `sizes` says.
        """
        lengths, inputs = self._measured(rows, lengths, inputs)
        ids = np.arange(len(sizes))
        offsets = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        result = np.zeros(int(offsets[-1]), dtype=np.float32)
        for positions, batch, counts in self._batches(lengths, ids, inputs, forward, tokens, description):
            values = batch.token_logps[batch.token_mask].cpu().numpy()
            if len(values) != int(np.asarray(sizes)[positions].sum()):
                raise ValueError(f"The examples {ids[positions][:5].tolist()} have {len(values)} scored tokens here.")
            if counts:
                result[np.concatenate([np.arange(offsets[i], offsets[i + 1]) for i in positions])] = values
        return self._summed(result)

    def _measured(
        self, rows: Rows | None, lengths: np.ndarray | None, inputs: Callable[[np.ndarray], Any] | None
    ) -> tuple[np.ndarray, Callable[[np.ndarray], Any]]:
        """Lengths and inputs of what is measured; rows are looked at only for what is not given."""
        if lengths is None:
            lengths = (rows or self.rows()).costs
        return lengths, inputs or (rows or self.rows()).collate

    def _batches(
        self,
        lengths: np.ndarray,
        ids: np.ndarray,
        inputs: Callable[[np.ndarray], Any],
        forward: Callable[..., Any] | None,
        tokens: int,
        description: str,
    ) -> Iterator[tuple[np.ndarray, Any, bool]]:
        """Positions in `ids`, their scored batch, and whether it is this rank's to count."""
        batches = cut_by_tokens(np.asarray(lengths)[ids], tokens)
        # Every rank runs as many forwards as the others, or a sharded model would wait for ever.
        rounds = -(-len(batches) // self.world)
        turns = [turn * self.world + self.rank for turn in range(rounds)]
        for turn in tqdm(turns, desc=description, disable=self.rank > 0):
            positions = batches[min(turn, len(batches) - 1)]
            batch_ids = ids[positions]
            batch = (forward or self.forward)(inputs(batch_ids), torch.as_tensor(batch_ids))
            yield positions, batch, turn < len(batches)

    def _summed(self, values: np.ndarray) -> np.ndarray:
        """Sum over the ranks; each entry is zero on all of them but one, so nothing is rounded."""
        return values if self.world == 1 else self.total(torch.from_numpy(values)).cpu().numpy()

    def from_first(self, size: int, compute: Callable[[], np.ndarray]) -> np.ndarray:
        """What the first process computes on its own, `(size,)` float64, on all of them."""
        values = np.asarray(compute(), dtype=np.float64) if self.rank == 0 else np.zeros(size)
        return self._summed(values)


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
