"""Gradients of single examples by one decoder block, each brought down to a few numbers."""

import numpy as np
import torch
from torch import Tensor

from ..core.run import Run
from ..functional.projection import projected, stream_of
from ..signals.ghost import GradientRequest
from .zero_order import BLOCK, block_parameters


def block_layers(run: Run, block: int = -1) -> list[str]:
    """
    Names of the linear layers of one decoder block whose parameters are trained (LoRA's among them).

    Raises:
        `ValueError`: if there is no such block, or none of its layers is trained.
    """
    wanted = {BLOCK.search(name)[1] for name in block_parameters(run.model, block)}  # type: ignore[index]
    found = [name for name in run.gradients.layers("linear") if (at := BLOCK.search(f"{name}.")) and at[1] in wanted]
    if not found:
        raise ValueError(f"block={block!r}: no linear layer of that block is trained. Name one of which some are.")
    return found


def gradient_features(run: Run, size: int, block: int = -1, name: str = "gradients") -> np.ndarray:
    """
    Random projection of the gradient of every example's own loss by one decoder block, `(N, size)` float32.

    Inner products are kept as in [`~dsel_trl.scorers.zero_order.zero_order_features`], which need no backward pass.

    Args:
        run ([`Run`]):
            The run, with the model in place.
        size (`int`):
            Numbers per example: a square.
        block (`int`, *optional*, defaults to `-1`):
            Decoder block whose linear layers count.
        name (`str`, *optional*, defaults to `"gradients"`):
            Whose draw of the projection it is.

    Time: one forward and one backward per example, shared by the ranks. Memory: the result.
    """
    seed = run.stream_seed(f"{name}/projection")

    def features(parameter: str, gradients: Tensor) -> Tensor:
        return projected(gradients, size, stream_of(seed, parameter))

    result = np.zeros((run.size, size), dtype=np.float32)
    request = GradientRequest(block_layers(run, block), features=features)
    for positions, found in run.gradients.each(run.rows, np.arange(run.size), request):
        result[positions] = found.features.cpu().numpy()
    return run.passes.total(torch.from_numpy(result)).cpu().numpy() if run.world > 1 else result
