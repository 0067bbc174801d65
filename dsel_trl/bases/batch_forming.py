"""What methods that form batches share: how much an example counts in a batch of varying size."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..core.method import Method
from ..core.parameters import check_choice
from ..signals.batch import Batch, Signal
from ..signals.pair_batch import PairBatch


@dataclass
class Batched(Method):
    """
    A method that plans batches (`batch`) of varying size; it keeps `mean_size`, their mean number of examples.

    DPO's loss is a mean over the pairs of a batch, so a pair in a small batch would count for more. The factor
    `size / mean_size` on the gate undoes that exactly: the gradients of a pass add up to those of all pairs alike.
    SFT's loss is a mean over the tokens of an optimizer step, which the size of a batch does not touch.
    """

    weighting: str = field(
        default="pair",
        metadata={"help": '"pair": every pair counts the same; "batch": every batch does, as TRL averages (DPO only)'},
    )

    signals = (Signal.LENGTH,)
    family = "indicator"
    criterion = "none"
    normalize = "batch"
    state = "none"

    def __post_init__(self) -> None:
        check_choice("weighting", self.weighting, ("pair", "batch"))
        self.mean_size = 1.0

    @property
    def hooks(self) -> frozenset[str]:
        return super().hooks - ({"weigh"} if self.weighting == "batch" else set())

    def weigh(self, batch: Batch) -> Tensor | None:
        if not isinstance(batch, PairBatch) or batch.size == self.mean_size:
            return None
        return torch.full((batch.size,), batch.size / self.mean_size, device=batch.ids.device)

    def state_dict(self) -> dict[str, Any]:
        return {"mean_size": self.mean_size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean_size = float(state["mean_size"])
