"""K-FAC: the curvature of the training loss by the linear layers of the policy, as two factors for each of them."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.run import Run
from ..functional.influence.quad import balance, damping, factored_ihvp, ihvp, kfac_sums
from ..signals.ghost import GradientRequest
from ..signals.ghost_layers import Layer

SOLVERS = ("exact", "factored")
# Projections of one input, whose outputs go into the same attention: of LoRA the matrix that sees that input.
JOINT = re.compile(r"^(.*?)(?:q_proj|k_proj|v_proj|query|key|value)(\.lora_A\.[^.]+)?$")


class Kfac:
    """
    Factors `S_x` and `S_delta` of linear layers, and products with the inverse of the Hessian that they stand for.

    The query, key and value projections of one attention have their factors together, biases as the weights of a
    further input that is 1.

    Args:
        layers (`Sequence[Layer]`):
            The layers.

    Raises:
        `ValueError`: for a layer that is not linear.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._layers = {layer.name: layer for layer in layers}
        # Layers with the factors that they share; a layer that uses the weight of another one adds to its factors.
        self._groups: dict[str, list[Layer]] = {}
        self._group_of: dict[str, str] = {}
        for layer in layers:
            if not layer.linear:
                raise ValueError(
                    f"layers: {layer.name!r} has no factors of the Hessian, which only linear layers have. Give "
                    "'attention', 'linear', 'lora', 'last-K' or names of linear layers."
                )
            weight = layer.parameters["weight"]
            if weight not in self._group_of:
                self._group_of[weight] = _joint(layer)
                self._groups.setdefault(self._group_of[weight], []).append(layer)
        self._waiting: dict[str, dict[str, Tensor]] = {}
        self._sums: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self._examples: dict[str, int] = {}

    def calibrate(self, run: Run, ids: np.ndarray, layers: str | Sequence[str]) -> None:
        """Takes the factors from training examples at the model as it is now: a forward and a backward of each."""
        own = len(ids[run.passes.rank :: run.world])

        def visit(name: str, x: Tensor, delta: Tensor, factor: Tensor) -> None:
            self._see(name, x, delta * factor.view(-1, 1, 1), own)

        for _ in run.gradients.each(run.rows, ids, GradientRequest(layers, visit=visit)):
            pass
        for group, sums in self._sums.items():
            x, delta, count = (run.passes.total(value) if run.world > 1 else value for value in sums)
            self._sums[group] = (x, delta, count)

    def _see(self, name: str, x: Tensor, delta: Tensor, own: int) -> None:
        layer = self._layers[name]
        weight = layer.parameters["weight"]
        group = self._group_of[weight]
        waiting = self._waiting.setdefault(group, {})
        waiting[weight] = delta
        members = self._groups[group]
        if len(waiting) < len(members):
            return
        delta = torch.cat([waiting[member.parameters["weight"]] for member in members], dim=-1)
        self._waiting[group] = {}
        # A rank that has run out of examples goes through one of another's again.
        if self._examples.get(group, 0) >= own:
            x, delta = x[:0], delta[:0]
        self._examples[group] = self._examples.get(group, 0) + len(x)
        if "bias" in layer.parameters:
            x = torch.cat([x, torch.ones_like(x[..., :1])], dim=-1)
        first, second, count = kfac_sums(x, delta)
        found = (first, second, first.new_tensor(float(count)))
        before = self._sums.get(group)
        self._sums[group] = found if before is None else tuple(a + b for a, b in zip(before, found, strict=True))  # type: ignore[assignment]

    def solve(self, gradient: dict[str, Tensor], share: float, solver: str = "exact") -> dict[str, Tensor]:
        """
        `(H + lam I)^-1` times a gradient.

        Args:
            gradient (`dict[str, torch.Tensor]`):
                By the names of the layers' parameters, whole.
            share (`float`):
                `lam` as a share of the mean eigenvalue of each layer.
            solver (`str`, *optional*, defaults to `"exact"`):
                `"exact"`, or `"factored"`: each factor damped on its own, with equal shares, which is cheaper.
        """
        found: dict[str, Tensor] = {}
        for group, members in self._groups.items():
            rows = [_as_matrix(layer, gradient) for layer in members]
            x, delta, count = self._sums[group]
            s_x, s_delta = (value / count.clamp(min=1) for value in (x, delta))
            lam = damping(s_x, s_delta, share)
            joint = torch.cat(rows)
            if solver == "exact":
                solved = ihvp(joint, s_x, s_delta, lam)
            else:
                solved = factored_ihvp(joint, s_x, s_delta, lam, balance(s_x, s_delta))
            for layer, part in zip(members, solved.split([len(row) for row in rows]), strict=True):
                found.update(_as_parameters(layer, part))
        return found


def _joint(layer: Layer) -> str:
    """Name of the factors of a layer: that of the whole attention for the projections of one input."""
    match = JOINT.match(layer.name)
    # In an attention across two sequences keys and queries are of different inputs.
    if match is None or "cross" in layer.name:
        return layer.name
    return f"{match[1]}qkv{match[2] or ''} of {'+'.join(sorted(layer.parameters))}"


def _as_matrix(layer: Layer, gradient: dict[str, Tensor]) -> Tensor:
    """A layer's gradient as one matrix `(d_out, d_in)`, its bias in a last column."""
    own: dict[str, Any] = {key: gradient[name].float() for key, name in layer.parameters.items()}
    weight: Tensor = own["weight"].T if layer.lies_across else own["weight"]
    return torch.cat([weight, own["bias"].unsqueeze(1)], dim=1) if "bias" in own else weight


def _as_parameters(layer: Layer, matrix: Tensor) -> dict[str, Tensor]:
    found = {}
    if "bias" in layer.parameters:
        found[layer.parameters["bias"]] = matrix[:, -1].contiguous()
        matrix = matrix[:, :-1]
    found[layer.parameters["weight"]] = (matrix.T if layer.lies_across else matrix).contiguous()
    return found
