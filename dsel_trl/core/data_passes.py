"""Extra passes over the data: length-sorted, token-budgeted, sharded over the ranks, with a progress bar."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..data.rows import Rows
from ..signals.batch import Batch
from .costs import Costs

# Bytes of one exchange.
PIECE = 2**26


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
        costs ([`Costs`], *optional*):
            Where the forwards of the passes are counted.
    """

    def __init__(
        self,
        rows: Callable[[], Rows],
        forward: Callable[..., Batch],
        rank: int = 0,
        world: int = 1,
        total: Callable[[Tensor], Tensor] = lambda values: values,
        costs: Costs | None = None,
    ) -> None:
        self.rows = rows
        self.forward = forward
        self.rank = rank
        self.world = world
        self.total = total
        self.costs = Costs() if costs is None else costs

    def measure(
        self,
        measure: Callable[[Any], Tensor],
        ids: np.ndarray | None = None,
        *,
        rows: Rows | None = None,
        inputs: Callable[[np.ndarray], Any] | None = None,
        lengths: np.ndarray | None = None,
        forward: Callable[..., Any] | None = None,
        reference: bool = True,
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
                Another forward, such as a helper model's. One that does not say what it ran (`costs.ran`) counts as
                another model's.
            reference (`bool`, *optional*, defaults to `True`):
                Whether `measure` reads anything of the reference model; without it no reference forward is made.
            tokens (`int`, *optional*, defaults to `8192`):
                Padded tokens per batch.
            description (`str`, *optional*, defaults to `"Scoring"`):
                Text of the progress bar.

        Time: one forward per example (and one of the reference, unless `reference=False` or it is in the data);
        memory: one batch and the result. The batches, and so the numbers, do not depend on the number of processes.
        """
        lengths, inputs = self._measured(rows, lengths, inputs)
        ids = np.arange(len(lengths)) if ids is None else np.asarray(ids, dtype=np.int64)
        if forward is None and not reference:
            forward = partial(self.forward, reference=False)
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
            lengths = (rows or self.rows()).pass_lengths
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
        gone_through: Counter[str] = Counter()
        for turn in tqdm(turns, desc=description, disable=self.rank > 0):
            positions = batches[min(turn, len(batches) - 1)]
            batch_ids = ids[positions]
            with self.costs.collecting() as ran:
                batch = (forward or self.forward)(inputs(batch_ids), torch.as_tensor(batch_ids))
            gone_through = ran
            yield positions, batch, turn < len(batches)
        # What a batch went through all have gone through, on whichever rank; a batch repeated for company is no cost.
        self.costs.add_all(gone_through or {"scorer_forwards": 1}, len(ids), int(np.asarray(lengths)[ids].sum()))

    def _summed(self, values: np.ndarray) -> np.ndarray:
        """Sum over the ranks; each entry is zero on all of them but one, so nothing is rounded."""
        return values if self.world == 1 else self.total(torch.from_numpy(values)).cpu().numpy()

    def from_first(self, size: int, compute: Callable[[], np.ndarray]) -> np.ndarray:
        """What the first process computes on its own, `(size,)` float64, on all of them."""
        values = np.asarray(compute(), dtype=np.float64) if self.rank == 0 else np.zeros(size)
        return self._summed(values)

    def everywhere(self, read: Callable[[], dict[str, np.ndarray] | None]) -> dict[str, np.ndarray] | None:
        """
        What `read` gives on the first process, arrays by name or `None`, on all of them, bit for bit.

        Only the first process calls it; if it fails there, it fails everywhere.
        """
        if self.world == 1:
            return read()
        arrays: dict[str, np.ndarray] | None = None
        header: dict[str, Any] = {}
        failure: Exception | None = None
        if self.rank == 0:
            try:
                arrays = read()
                if arrays is not None:
                    header["arrays"] = [[name, array.dtype.str, array.shape] for name, array in arrays.items()]
            except Exception as error:
                failure, header = error, {"error": f"{type(error).__name__}: {error}"}
        # How long the header is, what it says, and then the arrays one after the other.
        text = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)
        length = int(self.total(torch.tensor([len(text) if self.rank == 0 else 0])).item())
        header = json.loads(self._from_first(text, length).tobytes())
        if failure is not None:
            raise failure
        if "error" in header:
            raise RuntimeError(f"The first process failed: {header['error']}")
        if "arrays" not in header:
            return None
        result = {}
        for name, dtype, shape in header["arrays"]:
            own = np.empty(0, dtype=np.uint8) if arrays is None else _as_bytes(arrays[name])
            size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
            result[name] = self._from_first(own, size).view(dtype).reshape(shape)
        return result

    def _from_first(self, values: np.ndarray, size: int) -> np.ndarray:
        """The bytes `values` of the first process, `(size,)` uint8, on all of them."""
        result = np.zeros(size, dtype=np.uint8)
        if self.rank == 0:
            result[:] = values
        # In pieces: an exchange may go by way of the accelerator's memory.
        for start in range(0, size, PIECE):
            piece = slice(start, start + PIECE)
            # Zeros are added everywhere but on the first process, so no sum exceeds a byte.
            result[piece] = self.total(torch.from_numpy(result[piece])).cpu().numpy()
        return result


def _as_bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


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
