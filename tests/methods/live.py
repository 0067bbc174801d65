"""Short runs of one method, and the gradient that its own loss has on the same batch."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from dsel_trl import Method, SelectionCallback, create_method
from dsel_trl.functional.margins import average_logps
from dsel_trl.signals.pair_batch import PairBatch
from dsel_trl.signals.tap import label_log_probs
from tests import tiny, weighted


class KeepBatches(Method):
    """Keeps each micro-batch as the methods saw it."""

    name = "keep_batches"
    trainers = ("dpo", "sft", "reward")

    def __init__(self) -> None:
        self.batches: list[PairBatch] = []

    def weigh(self, batch: PairBatch) -> None:
        self.batches.append(batch)


class Logps(NamedTuple):
    """Log-probabilities of a batch's responses under a policy with gradient and its reference: sums and lengths."""

    policy: tuple[Tensor, Tensor]
    ref: tuple[Tensor, Tensor]
    lengths: tuple[Tensor, Tensor]

    @property
    def averages(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return tuple(average_logps(s, n) for s, n in zip(self.policy + self.ref, self.lengths * 2, strict=True))

    @property
    def margin(self) -> Tensor:
        """The log-ratio margin."""
        return (self.policy[0] - self.ref[0]) - (self.policy[1] - self.ref[1])


def logps(trainer: Any, batch: PairBatch) -> Logps:
    """Through the plain model, without tap, gate or fused head; the reference is the batch's own reading."""
    inputs = batch.inputs
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    outputs = trainer.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    sums = label_log_probs(outputs.logits, labels).sum(dim=1)
    ref = batch.ref_chosen_logps, batch.ref_rejected_logps
    return Logps(sums.chunk(2), ref, (batch.chosen_lengths, batch.rejected_lengths))


def first_step(trainer: Any, method: Any, stir: bool = True) -> tuple[dict[str, Tensor], list[PairBatch]]:
    """The gradient of the first optimizer step with the method attached, and the micro-batches behind it."""
    if stir:
        tiny.stir(trainer, scale=0.05)
    keep, gradients = KeepBatches(), weighted.KeepGradients()
    trainer.add_callback(gradients)
    trainer.add_callback(SelectionCallback(trainer, [method, keep]))
    trainer.train()
    return gradients.gradients, keep.batches


def own_gradient(
    trainer: Any, batches: list[PairBatch], loss: Callable[[Logps, PairBatch], Tensor]
) -> dict[str, Tensor]:
    """Gradient of the mean over the micro-batches of `loss`, a scalar of one micro-batch."""
    trainer.selection.detach()
    trainer.model.zero_grad()
    for batch in batches:
        (loss(logps(trainer, batch), batch) / len(batches)).backward()
    return weighted.gradients(trainer.model)


def assert_same_gradient(mine: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 2e-4) -> None:
    assert mine.keys() == expected.keys()
    scale = max(float(value.norm()) for value in expected.values())
    assert scale > 0
    for name, value in expected.items():
        error = float((mine[name] - value).norm()) / max(float(value.norm()), 1e-2 * scale)
        assert error < rtol, (name, error)


def one_step(make_trainer: Any, name: str, *, config: dict[str, Any] | None = None, **parameters: Any):
    """Trainer, gradient and micro-batches of one step of the method `name` with learning rate 0."""
    settings = {"max_steps": 1, "learning_rate": 0.0, "max_grad_norm": 0.0, "per_device_train_batch_size": 6}
    trainer = make_trainer("dpo", **{**settings, **(config or {})})
    method = create_method(name, **parameters)
    gradient, batches = first_step(trainer, method)
    return trainer, method, gradient, batches


def resumed_state(
    make_trainer: Any, name: str, tmp_path: Any, config: dict[str, Any] | None = None, **parameters: Any
):
    """`state_dict` of a method after an undisturbed run, and after one resumed from its middle; and both traces."""
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": 4}
    found = []
    for resume in (None, str(tmp_path / "whole" / "checkpoint-3")):
        folder = tmp_path / ("resumed" if resume else "whole")
        trainer = make_trainer("dpo", output_dir=folder, **{**settings, **(config or {})})
        method = create_method(name, **parameters)
        witness = tiny.attach(trainer, method)
        trainer.train(resume_from_checkpoint=resume)
        found.append((method.state_dict(), tiny.Trace.of(trainer, witness)))
    return found
