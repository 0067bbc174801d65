"""Per-example signals out of the forwards a trainer makes anyway.

TRL's trainers run the model through a fused LM head whose output carries per-token log-probabilities. A forward hook
keeps them while a training step is open; `PairBatch`, `SequenceBatch` and [`~dsel_trl.signals.kto_batch.KTOBatch`]
turn them into the quantities that methods ask for, computed only when asked.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..functional.preference.wpo import log_sum_squared_probs, token_logps
from .batch import Forward
from .gate import Gate


@dataclass
class Reading:
    """What the tap saw while it was open: the first forward with gradient, and those without in their order."""

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
        outputs (`tuple[str, ...]`, *optional*, defaults to `()`):
            Fields of [`Forward`] that are read beside `log_probs` where a model gives logits only.
    """

    def __init__(self, policy: nn.Module, reference: nn.Module | None = None, outputs: tuple[str, ...] = ()) -> None:
        self._outputs = outputs
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

    # Kept out of a compiled graph, in which it would see the tap as it was when the graph was made.
    @torch.compiler.disable
    def _read(self, module: nn.Module, args: Any, output: Any) -> None:
        reading = self._reading
        if reading is None:
            return
        name = "logits" if getattr(output, "log_probs", None) is None else "log_probs"
        values: Tensor | None = getattr(output, name, None)
        if values is None or (name == "logits" and reading.labels is None):
            return
        if reading.labels is not None and values.shape[0] != reading.labels.shape[0]:
            # A forward on other rows than the batch's own, as a trainer of the user's may make.
            return
        log_probs = values
        if name == "logits" and reading.labels is not None:
            # The head of a reward model gives one number per row.
            log_probs = values if values.dim() == 2 else label_log_probs(values.detach(), reading.labels)
        forward = Forward(
            log_probs.detach(),
            *(
                None if getattr(output, key, None) is None else getattr(output, key).detach()
                for key in ("entropy", "is_top1", "log_sum_sq_probs")
            ),
        )
        if name == "logits" and values.dim() > 2 and "log_sum_sq_probs" in self._outputs:
            forward.log_sum_sq_probs = log_sum_squared_probs(values.detach()[:, :-1])
        if values.requires_grad:
            # What a trainer of the user's runs besides, on the same rows, is weighed but not what is measured.
            reading.policy = reading.policy or forward
            if reading.gate is not None:
                setattr(output, name, reading.gate(values))
        else:
            reading.without_gradient.append(forward)
        if reading.when_read is not None:
            reading.when_read()


def label_log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of each next label, `(rows, T - 1)` in float32; 0 where the label is -100."""
    return token_logps(logits, labels)[0].float()
