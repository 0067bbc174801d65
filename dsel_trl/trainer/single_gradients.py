"""What single examples' gradients say beside the training: of a whole dataset, of candidates, of a few drawn."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..core.costs import Costs
from ..data.rows import Rows
from ..signals.batch import ROW_LENGTHS, Batch
from ..signals.ghost import ExampleGradients, GhostRecorder, GradientRequest
from ..signals.ghost_layers import Examples
from .forwards import evaluating


class SingleGradients:
    """The part of [`~dsel_trl.trainer.gradients.ModelGradients`] that tells examples apart."""

    trainer: Any
    costs: Costs
    score: Callable[..., Batch]
    parameters: Callable[..., dict[str, Tensor]]
    check_second_moments: Callable[[], None]
    grads_put_back: Callable[[], AbstractContextManager[None]]
    add_gradient: Callable[[dict[str, Tensor], dict[str, Tensor], Tensor], None]

    @property
    def recorder(self) -> GhostRecorder:
        """What listens to the layers of the model."""
        raise NotImplementedError

    @property
    def learning_rate(self) -> float:
        """Of the coming step, of the first parameter group."""
        return float(self.trainer.optimizer.param_groups[0]["lr"])

    def each(
        self, rows: Rows, ids: np.ndarray, request: GradientRequest, *, everywhere: bool = False
    ) -> Iterator[tuple[np.ndarray, ExampleGradients]]:
        """
        What a request wants of the gradients of single examples, in evaluation mode: a rank's share of them in turn.

        Args:
            rows ([`~dsel_trl.data.rows.Rows`]):
                The examples.
            ids (`np.ndarray`):
                Which of them; a rank has every `world`-th.
            request ([`~dsel_trl.signals.ghost.GradientRequest`]):
                What is wanted.
            everywhere (`bool`, *optional*, defaults to `False`):
                Whether every rank goes through all of them, in one batch, and each gets all of the result.

        Yields the positions in `ids` of a batch and what was found; one forward and one backward per example.
        """
        rank, world = self.trainer.accelerator.process_index, self.trainer.accelerator.num_processes
        size = len(ids) if everywhere else self.trainer.args.per_device_train_batch_size
        own = np.arange(len(ids)) if everywhere else np.arange(rank, len(ids), world)
        parameters, gone_through = self.parameters(request.layers), Counter[str]()
        for turn in range(-(-len(ids) // (size if everywhere else size * world))):
            # All ranks run as many batches; one that has run out repeats an example that does not count.
            positions = own[turn * size : (turn + 1) * size]
            batch = ids[positions] if len(positions) else ids[:1]
            inputs = rows.collate(batch)
            height, length = inputs["input_ids"].shape
            examples = Examples(len(batch), height, length, inputs.get(ROW_LENGTHS))
            # What is sharded has a gradient for every parameter after a backward pass, asked for or not.
            with (
                self.costs.collecting() as ran,
                self.grads_put_back(),
                evaluating(self.trainer),
                self.recorder.open([request], examples) as (found,),
            ):
                loss = self.score(inputs, torch.from_numpy(batch), gradient=True).loss.sum()
                self.recorder.forward_done()
                self.add_gradient({}, parameters, loss)
            gone_through = ran
            if len(positions):
                yield positions, found
        tokens, times = int(rows.pass_lengths[ids].sum()), world if everywhere else 1
        self.costs.add_all(dict.fromkeys(gone_through, times), len(ids), tokens)
        self.costs.add("backwards", times * len(ids), times * tokens)

    def moments(self, layers: str | Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
        """
        Adam's first and second moments of the parameters of `layers` as they are kept, whole and in float32.

        Raises:
            `ValueError`: for an optimizer without them.
        """
        self.check_second_moments()
        found = {}
        for name, value in self.parameters(layers).items():
            kept = [self.trainer.optimizer.state[value][key].float() for key in ("exp_avg", "exp_avg_sq")]
            first, second = (part.full_tensor() if isinstance(part, DTensor) else part for part in kept)
            found[name] = (first, second)
        return found
