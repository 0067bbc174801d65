"""Per-example signals out of the forwards a trainer makes anyway.

TRL's trainers run the model through a fused LM head whose output carries per-token log-probabilities. A forward hook
keeps them while a training step is open; `PairBatch`, `SequenceBatch` and [`~dsel_trl.signals.kto_batch.KTOBatch`]
turn them into the quantities that methods ask for, computed only when asked.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..functional.dpo_losses import pair_losses
from ..functional.preference.wpo import aligned_logps, wpo_pair_weight
from .gate import Gate

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
class Reading:
    """What the tap saw while it was open: the last forward with gradient, and those without in their order."""

    labels: Tensor | None = None
    gate: Gate | None = None
    policy: Forward | None = None
    without_gradient: list[Forward] = field(default_factory=list)
    when_read: Callable[[], None] | None = None

    @property
    def reference(self) -> Forward | None:
        """The last forward without gradient: all trainers run the reference model last."""
        return self.without_gradient[-1] if self.without_gradient else None


class Tap:
    """
    Listens to the forwards of a policy (and of a separate reference model) while it is open.

    Args:
        policy (`nn.Module`):
            The model whose outputs carry `log_probs` (or `logits`, from which they are computed).
        reference (`nn.Module`, *optional*):
            A separate reference model. With PEFT the reference is the policy with its adapter off; its forwards are
            told apart by running without gradient.
    """

    def __init__(self, policy: nn.Module, reference: nn.Module | None = None) -> None:
        self._reading: Reading | None = None
        modules = [policy] if reference is None else [policy, reference]
        self._handles = [module.register_forward_hook(self._read) for module in modules]

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def open(self, labels: Tensor | None = None, gate: Gate | None = None) -> Iterator[Reading]:
        """Collects the forwards of the `with` block; `gate`, if given, is put on those that carry gradient."""
        self._reading = Reading(labels=labels, gate=gate)
        try:
            yield self._reading
        finally:
            self._reading = None

    def _read(self, module: nn.Module, args: Any, output: Any) -> None:
        reading = self._reading
        if reading is None:
            return
        log_probs, name = getattr(output, "log_probs", None), "log_probs"
        if log_probs is None:
            logits, name = getattr(output, "logits", None), "logits"
            if logits is None or reading.labels is None:
                return
            # The head of a reward model gives one number per row.
            log_probs = logits if logits.dim() == 2 else label_log_probs(logits.detach(), reading.labels)
        forward = Forward(
            log_probs.detach(),
            *(
                None if getattr(output, key, None) is None else getattr(output, key).detach()
                for key in ("entropy", "is_top1", "log_sum_sq_probs")
            ),
        )
        values = getattr(output, name)
        if values.requires_grad:
            reading.policy = forward
            if reading.gate is not None:
                setattr(output, name, reading.gate(values))
        else:
            reading.without_gradient.append(forward)
        if reading.when_read is not None:
            reading.when_read()


def label_log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of each next label, `(rows, T - 1)` in float32; 0 where the label is -100."""
    labels = labels[:, 1:]
    logps = torch.gather(logits[:, :-1].float().log_softmax(-1), 2, labels.clamp(min=0).unsqueeze(2)).squeeze(2)
    return logps.masked_fill(labels == -100, 0.0)


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


@dataclass
class PairBatch(Batch):
    """A micro-batch of preference pairs: 2B rows, the chosen ones first."""

    @cached_property
    def token_mask(self) -> Tensor:
        """Completion tokens, `(2B, T)` bool, aligned with the log-probabilities."""
        return self.inputs["completion_mask"][:, 1:].bool()

    def _sums(self, forward: Forward) -> tuple[Tensor, Tensor]:
        logps = forward.log_probs[:, -self.token_mask.shape[1] :].float()
        if self.settings.ld_alpha is not None:
            position = self.token_mask.cumsum(dim=1)
            shared = torch.minimum(self.chosen_lengths, self.rejected_lengths).repeat(2).unsqueeze(1)
            logps = torch.where(position > shared, logps * self.settings.ld_alpha, logps)
        chosen, rejected = (logps * self.token_mask).sum(dim=1).chunk(2)
        return chosen, rejected

    @cached_property
    def _lengths(self) -> tuple[Tensor, Tensor]:
        chosen, rejected = self.token_mask.sum(dim=1).chunk(2)
        return chosen, rejected

    chosen_lengths = property(lambda self: self._lengths[0], doc="Completion tokens of the chosen responses, `(B,)`.")
    rejected_lengths = property(lambda self: self._lengths[1], doc="Completion tokens of the rejected ones, `(B,)`.")

    @cached_property
    def _policy_sums(self) -> tuple[Tensor, Tensor]:
        return self._sums(self.policy)

    @cached_property
    def _ref_sums(self) -> tuple[Tensor, Tensor]:
        if "ref_chosen_logps" in self.inputs:
            return self.inputs["ref_chosen_logps"].float(), self.inputs["ref_rejected_logps"].float()
        if self.reference is None:
            raise ValueError("This batch was scored without its reference model.")
        return self._sums(self.reference)

    policy_chosen_logps = property(lambda self: self._policy_sums[0], doc="Summed log-probabilities, `(B,)`.")
    policy_rejected_logps = property(lambda self: self._policy_sums[1], doc="Summed log-probabilities, `(B,)`.")
    ref_chosen_logps = property(lambda self: self._ref_sums[0], doc="Summed reference log-probabilities, `(B,)`.")
    ref_rejected_logps = property(lambda self: self._ref_sums[1], doc="Summed reference log-probabilities, `(B,)`.")

    @cached_property
    def log_ratio_margin(self) -> Tensor:
        """Policy-minus-reference log-probability of chosen minus that of rejected, `(B,)`, not scaled by beta."""
        return (self.policy_chosen_logps - self.ref_chosen_logps) - (
            self.policy_rejected_logps - self.ref_rejected_logps
        )

    @cached_property
    def implicit_margin(self) -> Tensor:
        """`beta * log_ratio_margin`: the reward margin as TRL logs it, `(B,)`."""
        return self.settings.beta * self.log_ratio_margin

    @cached_property
    def loss(self) -> Tensor:
        """Loss of each pair under the trainer's own loss types and weights, `(B,)`."""
        s = self.settings
        total = torch.zeros_like(self.policy_chosen_logps)
        for loss_type, loss_weight in zip(s.loss_types, s.loss_weights, strict=True):
            total = total + loss_weight * pair_losses(
                loss_type,
                self.policy_chosen_logps - self.ref_chosen_logps,
                self.policy_rejected_logps - self.ref_rejected_logps,
                beta=s.beta,
                label_smoothing=s.label_smoothing,
                chosen_lengths=self.chosen_lengths,
                rejected_lengths=self.rejected_lengths,
                chosen_logps=self.policy_chosen_logps,
                discopop_tau=s.discopop_tau,
                f_divergence=s.f_divergence,
                f_alpha=s.f_alpha,
            )
        return total * self._wpo_weight if s.use_weighting else total

    @property
    def _wpo_weight(self) -> Tensor:
        """TRL's own weight of each pair under `use_weighting`."""
        assert self.policy.log_sum_sq_probs is not None
        width = self.token_mask.shape[1]
        expected = self.policy.log_sum_sq_probs[:, -width:]
        aligned = aligned_logps(self.policy.log_probs[:, -width:], expected, self.token_mask)
        chosen, rejected = aligned.chunk(2)
        return wpo_pair_weight(chosen, rejected, None)

    @cached_property
    def lengths(self) -> Tensor:
        """Tokens of the pair as it is trained: both sequences with their prompts, `(B,)`."""
        chosen, rejected = self.inputs["attention_mask"].sum(dim=1).chunk(2)
        return chosen + rejected

    def row_weights(self, weights: Tensor) -> Tensor:
        return weights if weights.dim() > 1 or weights.numel() == 2 * self.size else weights.repeat(2)

    def example_weights(self, weights: Tensor) -> Tensor:
        if weights.dim() > 1:
            weights = (weights * self.token_mask).sum(dim=1) / self.token_mask.sum(dim=1).clamp(min=1)
        return weights.view(2, self.size).mean(dim=0)


@dataclass
class RewardBatch(PairBatch):
    """A micro-batch of pairs as a reward model sees them: one reward per row in the place of log-probabilities."""

    @cached_property
    def token_mask(self) -> Tensor:
        return self.inputs["attention_mask"][:, 1:].bool()

    @cached_property
    def _policy_sums(self) -> tuple[Tensor, Tensor]:
        raise ValueError("A reward model gives rewards, no log-probabilities.")

    @cached_property
    def rewards(self) -> tuple[Tensor, Tensor]:
        """Rewards of the chosen and of the rejected responses, `(B,)` each."""
        chosen, rejected = self.policy.log_probs.float().squeeze(-1).chunk(2)
        return chosen, rejected

    @cached_property
    def implicit_margin(self) -> Tensor:
        """Reward of the chosen less that of the rejected response, `(B,)`."""
        return self.rewards[0] - self.rewards[1]

    @cached_property
    def loss(self) -> Tensor:
        """Loss of each pair: Bradley-Terry with the dataset's margin, if it has one, and the centring term."""
        margin = self.implicit_margin - self.inputs.get("margin", 0.0)
        return -torch.nn.functional.logsigmoid(margin) + self.settings.center_rewards * sum(self.rewards) ** 2


@dataclass
class SequenceBatch(Batch):
    """A micro-batch of sequences (SFT): one row each, or all of them in one row when training is padding-free."""

    @cached_property
    def token_mask(self) -> Tensor:
        """Tokens that carry loss, `(rows, T)` bool, aligned with the log-probabilities."""
        return self.inputs["labels"][:, 1:] != -100

    @cached_property
    def _segments(self) -> Tensor | None:
        """Example index of each label position in a flattened row, `(1, T)`; `None` when an example is a row."""
        lengths = self.inputs.get(ROW_LENGTHS)
        if lengths is None:
            return None
        # Not read off `position_ids`: they start anew for each document of a packed row, and with each padding token.
        positions = torch.arange(1, self.inputs["input_ids"].shape[1], device=lengths.device)
        return torch.searchsorted(lengths.cumsum(0), positions, right=True).clamp(max=self.size - 1)[None]

    def _per_example(self, values: Tensor) -> Tensor:
        if self._segments is None:
            return values.sum(dim=1)
        return torch.zeros(self.size, dtype=values.dtype, device=values.device).index_add_(
            0, self._segments[0], values[0]
        )

    @cached_property
    def token_logps(self) -> Tensor:
        """Log-probability of each label, `(rows, T)`; 0 where there is no loss."""
        return self.policy.log_probs[:, -self.token_mask.shape[1] :].float() * self.token_mask

    @cached_property
    def lengths(self) -> Tensor:
        """Tokens that carry loss, `(B,)`."""
        return self._per_example(self.token_mask.long())

    @cached_property
    def policy_logps(self) -> Tensor:
        """Summed log-probabilities of the trained tokens, `(B,)`."""
        return self._per_example(self.token_logps)

    @cached_property
    def loss(self) -> Tensor:
        """Mean negative log-likelihood of each example's trained tokens, `(B,)`."""
        return -self.policy_logps / self.lengths.clamp(min=1)

    def row_weights(self, weights: Tensor) -> Tensor:
        if weights.dim() > 1 or self._segments is None:
            return weights
        return weights[self._segments]

    def example_weights(self, weights: Tensor) -> Tensor:
        if weights.dim() == 1:
            return weights
        return self._per_example(weights * self.token_mask) / self.lengths.clamp(min=1)
