"""Exact gradient weights for losses that end in a mean over examples.

A per-example weight cannot be put into a loss that is already reduced. It can be put on the path back: the gate is the
identity on the per-token log-probabilities, and its backward multiplies each row by the weight of its example. As the
loss of a pair (or a conversation) reaches the parameters only through its own rows, the parameters receive exactly the
gradient of the weighted loss, whatever the loss type.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

Place = Callable[[Tensor], Tensor]


class _WeightedIdentity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, gate: "Gate", place: Place | None) -> Tensor:
        ctx.gate, ctx.place = gate, place
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        ctx.gate.arrived += 1
        weights = ctx.gate.weights
        if weights is None:
            return grad, None, None
        if ctx.place is not None:
            weights = ctx.place(weights)
        if weights.dim() == 2 and weights.shape[1] < grad.shape[1]:
            # A prompt of PEFT's stands before the tokens, with positions of its own.
            weights = pad(weights, (grad.shape[1] - weights.shape[1], 0), value=1.0)
        if weights.shape[0] != grad.shape[0]:
            raise ValueError(f"{weights.shape[0]} weights meet the gradients of {grad.shape[0]} rows.")
        weights = weights.to(device=grad.device, dtype=grad.dtype)
        return grad * weights.reshape(weights.shape + (1,) * (grad.dim() - weights.dim())), None, None


class Gate:
    """
    The holder of one micro-batch's weights, read when the backward pass arrives.

    The weights are set after the forward pass, so that they may depend on this very batch. `None` leaves the gradient
    untouched, bit for bit; so does a weight of exactly 1.

    Example:

    ```python
    >>> gate = Gate()
    >>> loss = -gate(log_probs).sum(dim=1).mean()
    >>> gate.weights = torch.tensor([2.0, 0.0])
    >>> loss.backward()
    ```
    """

    def __init__(self) -> None:
        self.weights: Tensor | None = None
        # Forwards that the gate was put on, and gradients that came back through it.
        self.passed = 0
        self.arrived = 0

    # Kept out of a compiled graph, which would hold the weights that it met first, or none.
    @torch.compiler.disable
    def __call__(self, values: Tensor, place: Place | None = None) -> Tensor:
        """
        `values` `(rows, T, ...)`, unchanged; its gradient is multiplied by `weights` `(rows,)` or `(rows, T)`.

        `place` brings the weights into the layout of values that lie otherwise.
        """
        self.passed += 1
        return _WeightedIdentity.apply(values, self, place)

    @property
    def effective(self) -> bool:
        """Whether the weights, if there are any, have met the gradient of every forward they were put on."""
        return self.weights is None or 0 < self.passed <= self.arrived


class WeightAverage:
    """
    Mean weight of one optimizer step: sum and count over its micro-batches, and over the ranks by `reduce`.

    With one micro-batch per step the weights are divided by the mean before the backward pass. With accumulation the
    mean is known only after the last micro-batch: the accumulated gradient, being linear in the weights, is divided
    then. Both are the same weighted mean.
    """

    def __init__(self) -> None:
        self.total = 0.0
        self.count = 0

    def add(self, weights: Tensor) -> None:
        self.total += float(weights.cpu().double().sum())
        self.count += weights.numel()

    def scale(self, total: float, count: float) -> float:
        """Factor that makes `count` weights of sum `total` average 1; a step without weight stays without gradient."""
        return 1.0 if total == count or total <= 0.0 else count / total

    def reset(self) -> None:
        self.total, self.count = 0.0, 0
