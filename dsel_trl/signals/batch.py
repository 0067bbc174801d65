"""A micro-batch as a method sees it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

# Key of a collated batch that says how long each example is where all of them lie in one row.
ROW_LENGTHS = "example_lengths"


class Signal(StrEnum):
    """What a run can measure of an example."""

    POLICY_LOGPS = "policy_logps"
    REF_LOGPS = "ref_logps"
    IMPLICIT_MARGIN = "implicit_margin"
    EXPLICIT_MARGIN = "explicit_margin"
    LOSS = "loss"
    LENGTH = "length"
    TOKEN_LOGPS = "token_logps"
    LOG_SUM_SQ_PROBS = "log_sum_sq_probs"
    TEXT = "text"
    EMBEDDING = "embedding"
    GENERATION = "generation"
    INFLUENCE = "influence"


@dataclass
class Forward:
    """Per-token outputs of one forward, each `(rows, T)` or `None`; position t belongs to label t + 1."""

    log_probs: Tensor
    entropy: Tensor | None = None
    is_top1: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None


@dataclass
class LossSettings:
    """What of the trainer decides the value of an example's loss; `kl` is KTO's KL term, a number of the batch."""

    beta: float = 0.1
    loss_types: tuple[str, ...] = ("sigmoid",)
    loss_weights: tuple[float, ...] = (1.0,)
    label_smoothing: float = 0.0
    discopop_tau: float = 0.05
    f_divergence: str = "reverse_kl"
    f_alpha: float = 1.0
    ld_alpha: float | None = None
    center_rewards: float = 0.0
    use_weighting: bool = False
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    kl: float | Tensor = 0.0


@dataclass
class Batch:
    """
    One micro-batch as a method sees it. Tensors are detached, float32 and on the training device.

    Attributes:
        ids (`torch.Tensor` of shape `(B,)`, int64):
            Row of each example in `trainer.train_dataset` (for a stream: the hash of its content).
        inputs (`dict`):
            The collated batch, as the trainer is about to use it.
        progress (`float`):
            Share of the planned optimizer steps that are done, in [0, 1].
    """

    ids: Tensor
    inputs: dict[str, Any]
    policy: Forward
    reference: Forward | None = None
    settings: LossSettings = field(default_factory=LossSettings)
    progress: float = 0.0
    columns: Callable[[str, Tensor], Tensor] | None = None
    gather_rows: Callable[[Tensor], tuple[Tensor, slice]] | None = None

    @property
    def size(self) -> int:
        return self.ids.numel()

    def column(self, name: str) -> Tensor:
        """Values of a numeric dataset column for these examples, `(B,)` float32."""
        if self.columns is None:
            raise ValueError(f"This batch knows no dataset columns, but {name!r} was asked for.")
        return self.columns(name, self.ids).to(self.ids.device, torch.float32)

    def gather(self, values: Tensor) -> tuple[Tensor, slice]:
        """The `values` of all ranks in rank order, and the slice of it that is this batch's own."""
        if self.gather_rows is None:
            return values, slice(0, values.shape[0])
        return self.gather_rows(values)

    @property
    def loss(self) -> Tensor:
        """Loss of each example, `(B,)`."""
        raise NotImplementedError

    @property
    def lengths(self) -> Tensor:
        """Tokens of each example, `(B,)`."""
        raise NotImplementedError

    @property
    def implicit_margin(self) -> Tensor:
        """Reward margin of each pair or labelled response, `(B,)`; batches without preferences have none."""
        raise NotImplementedError("Only preference pairs have an implicit margin.")

    def row_weights(self, weights: Tensor) -> Tensor:
        """Weights in the layout of the log-probabilities: `(rows,)`, or `(rows, T)` where examples share a row."""
        raise NotImplementedError

    def example_weights(self, weights: Tensor) -> Tensor:
        """Mean weight of each example, `(B,)`, of weights in row layout."""
        raise NotImplementedError
