"""Per-example signals out of the forwards a trainer makes anyway.

TRL's trainers run the model through a fused LM head whose output carries per-token log-probabilities; where they do
not, up to TRL 1.14, these are computed from the logits. A forward hook keeps them while a training step is open;
`PairBatch`, `SequenceBatch` and [`~dsel_trl.signals.kto_batch.KTOBatch`] turn them into the quantities that methods
ask for, computed only when asked.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..functional.preference.wpo import token_logps
from .batch import Forward
from .gate import Gate
from .logits import InnerLoss, beside_logits, read_logits


@dataclass
class Reading:
    """What the tap saw while it was open: the first forward with gradient, and those without in their order."""

    labels: Tensor | None = None
    # Labels of rows that are no examples (of KTO's KL term), which pass through the same models.
    other_labels: Tensor | None = None
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
        around (`nn.Module`, *optional*):
            What stands around the policy. With a prompt of PEFT's switched off, its forward is the policy's own, which
            is called past the policy's hooks.
    """

    def __init__(
        self,
        policy: nn.Module,
        reference: nn.Module | None = None,
        outputs: tuple[str, ...] = (),
        around: nn.Module | None = None,
    ) -> None:
        self.outputs = outputs
        self._reading: Reading | None = None
        self._inner: InnerLoss | None = None
        self._handles = [
            policy.register_forward_pre_hook(self._enter, with_kwargs=True),
            policy.register_forward_hook(self._leave, always_call=True),
        ]
        for module in [policy] if reference is None else [policy, reference]:
            self._handles.append(module.register_forward_hook(self._read, with_kwargs=True))
        self._heard = False
        if around is not None:
            self._handles.append(around.register_forward_pre_hook(self._enter_around))
            self._handles.append(around.register_forward_hook(self._read_around, with_kwargs=True))

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def open(
        self, labels: Tensor | None = None, gate: Gate | None = None, other_labels: Tensor | None = None
    ) -> Iterator[Reading]:
        """
        Collects the forwards of the `with` block; `gate`, if given, is put on those that carry gradient.

        The labels are those of the examples, and of other rows that pass through the models meanwhile.
        """
        self._reading = Reading(labels=labels, other_labels=other_labels, gate=gate)
        try:
            yield self._reading
        finally:
            self._reading = self._inner = None

    @contextmanager
    def closed(self) -> Iterator[None]:
        """For forwards of the `with` block that are none of the batch's own: they are neither read nor weighed."""
        before, self._reading = self._reading, None
        try:
            yield
        finally:
            self._reading = before

    # Kept out of a compiled graph, in which they would see the tap as it was when the graph was made.
    @torch.compiler.disable
    def _enter(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Before a forward of the policy: a model with labels, but no fused head, computes its loss itself."""
        reading, labels = self._reading, kwargs.get("labels")
        self._inner = None
        if reading is None or labels is None or kwargs.get("fused_lm_head"):
            return
        if reading.labels is None or labels.shape[0] == reading.labels.shape[0]:
            self._inner = InnerLoss(labels, reading.gate, self.outputs)
            self._inner.__enter__()

    @torch.compiler.disable
    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._inner is not None:
            self._inner.__exit__(None, None, None)

    @torch.compiler.disable
    def _enter_around(self, module: nn.Module, args: Any) -> None:
        self._heard = False

    @torch.compiler.disable
    def _read_around(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if not self._heard:
            self._read(module, args, kwargs, output)

    @torch.compiler.disable
    def _read(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        reading, inner = self._reading, self._inner
        self._inner, self._heard = None, True
        if reading is None:
            return
        read = None if inner is None else inner.forward()
        if read is None:
            read = self._read_output(reading, args, kwargs, output)
        if read is None:
            return
        forward, carries_gradient = read
        if carries_gradient:
            # What a trainer of the user's runs besides, on the same rows, is weighed but not what is measured.
            reading.policy = reading.policy or forward
        else:
            reading.without_gradient.append(forward)
        if reading.when_read is not None:
            reading.when_read()

    def _read_output(
        self, reading: Reading, args: Any, kwargs: dict[str, Any], output: Any
    ) -> tuple[Forward, bool] | None:
        """What a model's output says, and whether it carries gradient; the gate is put on it then."""
        name = "log_probs" if getattr(output, "log_probs", None) is not None else "logits"
        values = getattr(output, name, None)
        if values is None:
            return None
        if reading.labels is not None and values.shape[0] != reading.labels.shape[0]:
            # A forward on other rows than the batch's own, as a trainer of the user's may make.
            return None
        place = None
        # The head of a reward model gives one number per row.
        if name == "log_probs" or values.dim() == 2:
            forward = Forward(
                values.detach(),
                *(
                    None if getattr(output, key, None) is None else getattr(output, key).detach()
                    for key in ("entropy", "is_top1", "log_sum_sq_probs")
                ),
            )
        else:
            labels = _labels_of(reading, args, kwargs)
            if labels is None:
                return None
            forward, place = read_logits(values, labels, self.outputs), beside_logits
        if values.requires_grad and reading.gate is not None:
            setattr(output, name, reading.gate(values, place))
        return forward, values.requires_grad


def _labels_of(reading: Reading, args: Any, kwargs: dict[str, Any]) -> Tensor | None:
    """Labels of the rows of a forward, told by the tokens where there are rows of two kinds."""
    if reading.other_labels is None:
        return reading.labels
    ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
    for labels in (reading.labels, reading.other_labels):
        if labels is not None and labels.shape == ids.shape and bool(((labels == -100) | (labels == ids)).all()):
            return labels
    return None


def label_log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of each next label, `(rows, T - 1)` in float32; 0 where the label is -100."""
    return token_logps(logits, labels)[0].float()
