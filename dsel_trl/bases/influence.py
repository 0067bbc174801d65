"""What methods share that compare each example's gradient with that of a target."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from ..core.parameters import Reads, check_choice, check_whole
from ..core.run import Run
from ..functional.adam import adam_direction
from .target import Targeted

PRECONDITIONS = ("none", "adam")
LAYERS = (
    "whose gradients count: linear (all linear layers but the head), attention, lora, last-K (the linear layers of "
    "the last K blocks), norms, all, or names of modules"
)


@dataclass
class FollowsGradient(Targeted):
    """
    A method that multiplies each example's gradient with that of a target, worked out anew every few steps.

    `direction(run)`, asked in `gradients(run)`, is the target's gradient as it is to be multiplied with; it is in the
    checkpoint where a step after it still needs it.
    """

    layers: str | Sequence[str] = field(default="linear", metadata={"help": LAYERS})
    target_refresh: int = field(
        default=1, metadata={"help": "optimizer steps for which one gradient of the target serves; 1 is exact"}
    )
    precondition: str = field(
        default="none",
        metadata={"help": "adam: the target's gradient as Adam would scale it, by the run's own second moments"},
    )

    # Whether the target's loss is its mean, or the sum over its examples.
    mean: ClassVar[bool] = True
    preconditions: ClassVar[tuple[str, ...]] = PRECONDITIONS
    reads: ClassVar[Reads] = {}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("target_refresh", self.target_refresh, 1)
        check_choice("precondition", self.precondition, self.preconditions)
        self._direction: dict[str, Tensor] = {}
        # Of a checkpoint, until the model is there to say how it is sharded.
        self._saved: dict[str, np.ndarray] = {}
        self._collected: dict[str, np.ndarray] = {}

    def check(self, run: Run) -> None:
        super().check(run)
        run.gradients.layers(self.layers)
        if self.precondition == "adam":
            run.gradients.check_second_moments()

    def units(self, run: Run) -> dict[str, float]:
        found, steps = super().units(run), run.max_steps
        refreshes = -(-steps // self.target_refresh)
        if self.precondition == "adam":
            # Adam knows nothing before its first step: the second one makes up for it.
            refreshes = max(0, steps - 1) // self.target_refresh + int(self.target_refresh > 1 and steps > 1)
        examples = found["target example"]
        return {
            **found,
            "target example and refresh": examples * refreshes,
            "target example and step": examples * steps,
        }

    def target_gradient(self, run: Run) -> dict[str, Tensor]:
        """Gradient of the target's loss by the parameters of `layers`, at the model as it is now."""
        return run.gradients.of(self.target_rows(run), layers=self.layers, mean=self.mean)

    def direction(self, run: Run) -> dict[str, Tensor] | None:
        """What the examples' gradients are multiplied with in the coming step; `None` while Adam knows nothing."""
        if self._saved:
            parameters = run.gradients.parameters(self.layers)
            self._direction = {name: _placed(self._saved[name], value) for name, value in parameters.items()}
            self._saved = {}
        if self._direction and run.step % self.target_refresh:
            return self._direction
        moments = run.gradients.second_moments(self.layers) if self.precondition == "adam" else None
        if self.precondition == "adam" and moments is None:
            return None
        found = self.target_gradient(run)
        if moments is not None:
            found = {name: adam_direction(value, *moments[name]) for name, value in found.items()}
        self._direction = found
        return found

    def collect(self, run: Run) -> None:
        # A direction that the next step makes anew need not be kept.
        needed = self._direction if run.step % self.target_refresh else {}
        self._collected = {name: gathered(value).cpu().numpy() for name, value in needed.items()}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), **{f"direction/{name}": v for name, v in self._collected.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        prefix = "direction/"
        self._saved = {name.removeprefix(prefix): v for name, v in state.items() if name.startswith(prefix)}


def gathered(value: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded; all ranks must ask."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def length(direction: Mapping[str, Tensor]) -> float:
    """Norm of a gradient over all its parameters."""
    squares = [value.detach().double().square().sum() for value in direction.values()]
    return sum(float(gathered(square)) for square in squares) ** 0.5


def sharded_like(whole: Tensor, like: Tensor) -> Tensor:
    """A tensor that is whole on each rank, sharded as another one is."""
    return distribute_tensor(whole, like.device_mesh, like.placements) if isinstance(like, DTensor) else whole


def _placed(values: np.ndarray, like: Tensor) -> Tensor:
    return sharded_like(torch.from_numpy(values.copy()).to(like.device), like)
