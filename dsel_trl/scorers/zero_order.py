"""Gradients of single examples along shared random directions, by forwards alone."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from ..core.run import Run
from ..functional.influence.adapt_inf import directional_derivative
from ..signals.batch import Batch
from ..signals.pair_batch import PairBatch

BLOCK = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.(\d+)\.")


def block_parameters(model: Any, block: int = -1) -> dict[str, Tensor]:
    """
    The trainable parameters of one decoder block, by name.

    Args:
        model (`nn.Module`):
            A model whose blocks are numbered (`layers.0`, `h.0`).
        block (`int`, *optional*, defaults to `-1`):
            Which; negative ones count from the last.

    Raises:
        `ValueError`: if there is no such block, or nothing of it is trained or in place.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    numbered = {int(at[1]) for name, _ in model.named_parameters() if (at := BLOCK.search(name)) is not None}
    count = max(numbered, default=-1) + 1
    if not -count <= block < count:
        raise ValueError(f"block={block!r}: the model has {count} decoder blocks that can be told by their names.")
    wanted = block % count
    found = {name: p for name, p in trained if (at := BLOCK.search(name)) is not None and int(at[1]) == wanted}
    if not found:
        raise ValueError(f"block={block!r}: no parameter of that block is trained. Name one that is.")
    if any(parameter.numel() == 0 for parameter in found.values()):
        raise ValueError(
            "The parameters lie in parts on other processes (DeepSpeed ZeRO-3), where they cannot be moved along a "
            "direction: use ZeRO-2, FSDP2 or DDP."
        )
    return found


class Directions:
    """
    Moves some parameters along random directions and puts them back, bit for bit.

    Args:
        parameters (`dict[str, torch.Tensor]`):
            What is moved; sharded ones are moved shard by shard.
        seed (`Callable[[int], int]`):
            Seed of each direction: the same one for every example, whatever the batch.
    """

    def __init__(self, parameters: dict[str, Tensor], seed: Callable[[int], int]) -> None:
        self.parameters, self.seed = parameters, seed

    @contextmanager
    def in_place(self) -> Iterator[Callable[[int, float], None]]:
        """Gives `move(direction, step)`, which sets the parameters to where they were plus so much of a direction."""
        before = {name: p.detach().clone() for name, p in self.parameters.items()}

        @torch.no_grad()
        def move(direction: int, step: float) -> None:
            generator = torch.Generator().manual_seed(self.seed(direction))
            for name, parameter in self.parameters.items():
                drawn = torch.randn(parameter.shape, generator=generator).to(parameter.device)
                if isinstance(parameter, DTensor):
                    drawn = distribute_tensor(drawn, parameter.device_mesh, parameter.placements)
                parameter.copy_(before[name] + (step * drawn).to(parameter.dtype))

        try:
            yield move
        finally:
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    parameter.copy_(before[name])


def descent(batch: Batch) -> Tensor:
    """
    What falls when an example is learned, `(B,)`: the loss of a sequence, the margin of a pair with its sign turned.

    A pair's loss is a falling function of its margin: the gradients of both have one direction, and the margin's needs
    no reference model.
    """
    if isinstance(batch, PairBatch):
        return batch.policy_rejected_logps - batch.policy_chosen_logps
    return batch.loss


def zero_order_features(
    run: Run, directions: int, eps: float, block: int = -1, name: str = "zero_order"
) -> np.ndarray:
    """
    Derivative of every example's loss along shared random directions, `(N, q)` float32, divided by `sqrt(q)`.

    With the same Gaussian directions for all examples this is the random projection of their gradients: inner products
    are kept, as they are not where each example has directions of its own.

    Args:
        run ([`Run`]):
            The run, with the model in place.
        directions (`int`):
            q: how many.
        eps (`float`):
            How far the parameters are moved to either side; float32 bears 1e-3, bfloat16 needs 1e-2.
        block (`int`, *optional*, defaults to `-1`):
            Decoder block whose trainable parameters are moved.
        name (`str`, *optional*, defaults to `"zero_order"`):
            Whose draw of directions it is.

    Time: `2 q` forwards per example. Memory: the result, and a copy of the block.
    """
    moved = Directions(block_parameters(run.model, block), partial(run.stream_seed, f"{name}/direction"))

    def derivatives(inputs: dict[str, Any], ids: Tensor) -> Tensor:
        def loss_at(direction: int, step: float) -> np.ndarray:
            move(direction, step)
            return descent(run.passes.forward(inputs, ids, reference=False)).double().cpu().numpy()

        found = [directional_derivative(partial(loss_at, q), eps) for q in range(directions)]
        return torch.from_numpy(np.stack(found, axis=1) / np.sqrt(directions))

    with moved.in_place() as move:
        return run.passes.measure(lambda values: values, forward=derivatives, description="Gradient features")
