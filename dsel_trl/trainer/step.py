"""One optimizer step: its micro-batches between forward and backward, and what all ranks learn of it."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial, reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.composition import Composition
from ..core.metrics import Metrics
from ..core.run import Run, Step
from ..data.rows import Rows
from ..signals.batch import ROW_LENGTHS, Batch, Forward
from ..signals.gate import Gate, WeightAverage
from ..signals.tap import Reading, Tap
from .forwards import attributes, make_batch, score_rows, token_count
from .gradients import StepGradients
from .kinds import COLUMNS, EXAMPLE_ID, labels_of, trainer_kind
from .matching import per_example, per_row


@dataclass
class Listening:
    """One micro-batch between its forward and its backward."""

    ids: Tensor
    inputs: dict[str, Any]
    columns: dict[str, Tensor]
    gate: Gate | None
    reading: Reading
    batch: Batch | None = None
    row: dict[str, Tensor] = field(default_factory=dict)


class OptimizerStep:
    """
    Listens to the forwards of a step, scores and weighs their batches, and exchanges what was measured.

    Args:
        trainer:
            The re-typed trainer.
        methods ([`Composition`]):
            The methods of the run.
        run ([`Run`]):
            The run they see.
        tap ([`Tap`]):
            Open while a micro-batch's loss is computed.
        readers (`Sequence[str]`, *optional*):
            Who looks at the batches beside the methods.
    """

    def __init__(self, trainer: Any, methods: Composition, run: Run, tap: Tap, readers: Sequence[str] = ()) -> None:
        self.trainer, self.methods, self.run, self.tap = trainer, methods, run, tap
        # Who looks at the batches; nobody does where a method only leaves the run as it is.
        self.readers = [method.name for method in methods.methods if method.reads_batches] + list(readers)
        self.kind = trainer_kind(trainer)
        self.average = WeightAverage()
        self.gradients = StepGradients(trainer, methods, run)
        # KTO's KL term in the batch trained last: what a pass, which has no batch of its own, takes for it.
        self.kl: float | Tensor = 0.0
        self._rows: list[dict[str, Tensor]] = []
        self._listening: Listening | None = None
        self._micro_batches = 1
        self._made: dict[str, Any] = {}

    @property
    def _trainer_name(self) -> str:
        return type(self.trainer).__name__.removeprefix("Selective")

    def begin(self, micro_batches: int) -> None:
        """Called when the micro-batches of the next optimizer step have been fetched."""
        self._micro_batches = micro_batches
        self._rows, self._made = [], {}
        self.average.reset()
        if micro_batches:
            self.gradients.begin()

    def takes(self, beside: dict[str, Tensor]) -> bool:
        """
        Whether a method looks at the batch that this came beside.

        Raises:
            `ValueError`: if one does, but the batch has come without its ids.
        """
        self._listening = None
        if self.readers and EXAMPLE_ID not in beside:
            raise ValueError(
                f"A training batch came without the ids of its examples, so {self.readers} cannot act on it. "
                "Something keeps only the model's inputs of a batch, or makes batches of its own: a "
                "`_prepare_inputs`, `training_step` or `get_train_dataloader` of the trainer's class. Let it pass on "
                f"the key {EXAMPLE_ID!r}, and let `super().get_train_dataloader()` make the loader."
            )
        if EXAMPLE_ID in beside and not self.readers:
            with contextlib.suppress(ValueError):
                self._rows.append({"ids": per_example(beside[EXAMPLE_ID], self.kind.layout)})
        return bool(self.readers)

    def after_backward(self) -> None:
        """
        After the backward pass of a micro-batch, before the optimizer moves: the weights must have met the gradient.

        Raises:
            `ValueError`: if they have not, or a layer that is listened to has not.
        """
        listening, self._listening = self._listening, None
        if listening is None:
            return
        if listening.gate is None or listening.gate.effective:
            self.gradients.backward_done(listening.batch, listening.row)
            return
        names = [method.name for method in self.methods.using("weigh")]
        raise ValueError(
            f"The weights of {names} did not reach the gradient: the loss of {self._trainer_name} does not "
            "come from the log-probabilities of the model's forward. A `compute_loss` that returns `model(**inputs)"
            ".loss`, a loss computed inside the model, or a forward that skips the model's hooks does this. Compute "
            "the loss as TRL's trainer does, from `outputs.log_probs` (or `outputs.logits`)."
        )

    @contextlib.contextmanager
    def listen(self, beside: dict[str, Tensor], inputs: dict[str, Any]) -> Iterator[Listening]:
        """Opens tap and gate for one micro-batch; methods that adjust the loss act when its forwards are done."""
        ids = per_example(beside[EXAMPLE_ID], self.kind.layout)
        known = {key: values.flatten()[: len(ids)] for key, values in beside.items() if key != EXAMPLE_ID}
        layout = {ROW_LENGTHS: known.pop(ROW_LENGTHS)} if ROW_LENGTHS in known else {}
        gate = Gate() if self.methods.using("weigh") else None
        labels = labels_of(self.kind, inputs)
        with contextlib.ExitStack() as stack:
            reading = stack.enter_context(self.tap.open(labels, gate, self.kind.other_labels(inputs)))
            inputs = {**inputs, **layout}
            listening = self._listening = Listening(ids, inputs, known, gate, reading)
            self.gradients.listen(ids, inputs)
            if self.methods.using("adjust"):
                reading.when_read = partial(self._adjust, listening, stack)
            yield listening

    def _adjust(self, listening: Listening, stack: contextlib.ExitStack) -> None:
        reading = listening.reading
        if reading.policy is None or len(reading.without_gradient) < self.kind.forwards_without_gradient(self.trainer):
            return
        listening.batch = self._batch(listening)
        for method in self.methods.using("adjust"):
            values = method.adjust(self.run, listening.batch)
            if values:
                stack.enter_context(attributes(self.trainer, values))

    def after_forward(self, listening: Listening, items: Any = None) -> Tensor | None:
        """
        Scores and weighs the batch whose loss was just computed; returns what is to be added to the loss.

        `items` is what the trainer has divided a sum over tokens by, where it does.
        """
        batch = listening.batch = listening.batch or self._batch(listening)
        self.kl = batch.settings.kl
        values: dict[str, Tensor] = {"loss": batch.loss}
        if self.kind.margin:
            values["implicit_margin"] = batch.implicit_margin
        for method in self.methods.using("score"):
            scores = method.score(batch)
            values.update(scores if isinstance(scores, dict) else {method.name: scores})
        weights = self._weigh(batch, listening.gate)
        if weights is not None:
            values["weight"] = weights
        listening.row = {"ids": batch.ids, "length": batch.lengths, **values}
        self._rows.append(listening.row)
        self.gradients.forward_done(batch, None if listening.gate is None else listening.gate.weights, items)
        extra: Tensor | None = None
        for method in self.methods.using("extra_loss"):
            term = method.extra_loss(self.run, batch)
            if term is not None:
                extra = term if extra is None else extra + term
        return extra

    def _weigh(self, batch: Batch, gate: Gate | None) -> Tensor | None:
        """Puts the product of all weights on the gate; returns each example's weight as far as it is known now."""
        if gate is None:
            return None
        averaged: Tensor | None = None
        plain: Tensor | None = None
        correction: Tensor | None = None
        for method in self.methods.using("weigh"):
            weights = method.weigh(batch)
            if weights is None:
                continue
            weights = torch.nan_to_num(batch.row_weights(weights.detach().float()), nan=0.0, posinf=0.0, neginf=0.0)
            if method.normalize == "batch":
                correction = weights if correction is None else _times(correction, weights)
            elif method.normalize == "mean1":
                averaged = weights if averaged is None else _times(averaged, weights)
            else:
                plain = weights if plain is None else _times(plain, weights)
        if averaged is None and plain is None:
            gate.weights = correction
            return None
        per_example = torch.ones(batch.size, device=batch.ids.device)
        if averaged is not None:
            means = batch.example_weights(averaged)
            per_example = per_example * means
            if self._micro_batches == 1:
                total, _ = batch.gather(means)
                scale = self.average.scale(float(total.cpu().double().sum()), total.numel())
                averaged, per_example = averaged * scale, per_example * scale
            else:
                self.average.add(means)
        if plain is not None:
            per_example = per_example * batch.example_weights(plain)
        factors = [factor for factor in (averaged, plain, correction) if factor is not None]
        gate.weights = reduce(_times, factors)
        return per_example

    def accumulated_scale(self) -> float:
        """Factor for the gradient accumulated over several micro-batches, so that its weights average 1."""
        if self._micro_batches == 1 or not self.methods.using("weigh"):
            return 1.0
        sums = torch.tensor([self.average.total, float(self.average.count)], dtype=torch.float64)
        accelerator = self.trainer.accelerator
        if accelerator.num_processes > 1:
            sums = accelerator.reduce(sums.to(accelerator.device), "sum").cpu()
        if sums[1] == 0:
            return 1.0
        scale = self.average.scale(float(sums[0]), float(sums[1]))
        for row in self._rows:
            if "weight" in row:
                row["weight"] = row["weight"] * scale
        return scale

    def context(self, columns: dict[str, Tensor] | None = None) -> dict[str, Any]:
        columns = columns or {}

        def column(name: str, ids: Tensor) -> Tensor:
            key = f"{COLUMNS}.{name}"
            if key in columns:
                return columns[key]
            return torch.from_numpy(self.run.column(name)[ids.cpu().numpy()])

        return {"progress": self.run.progress, "columns": column, "gather_rows": self.gather}

    def _batch(self, listening: Listening) -> Batch:
        if listening.reading.policy is None:
            raise ValueError(
                f"{self.readers} measure the examples of a batch, but no forward of the model on this batch was seen: "
                f"{self._trainer_name} runs it on other rows, or calls its `forward` past its hooks."
            )
        return make_batch(
            self.trainer, listening.ids, listening.inputs, listening.reading, **self.context(listening.columns)
        )

    def score_rows(self, inputs: dict[str, Any], ids: Tensor, **how: Any) -> Batch:
        return score_rows(self.trainer, inputs, ids, kl=self.kl, costs=self.run.costs, **how, **self.context())

    def loss(self, rows: Rows, ids: np.ndarray) -> Tensor:
        """
        Loss of each of the examples `ids` of some rows, `(len(ids),)`, with gradient: a term of the loss of this step.

        The batch that is being trained does not see their forward. Every process must ask for as many.
        """
        inputs = rows.collate(ids)
        with self.tap.closed(), self.run.costs.collecting() as ran:
            batch = self.score_rows(inputs, torch.as_tensor(ids), gradient=True)
        world = self.trainer.accelerator.num_processes
        self.run.costs.add_all({**ran, "backwards": 1}, world * len(ids), world * token_count(inputs))
        return batch.loss

    def unscored(self, inputs: dict[str, Any], ids: Tensor) -> Batch:
        """Candidates of which only the ids and inputs are looked at: no forward is made."""
        device = inputs["input_ids"].device
        nothing = Reading(policy=Forward(torch.empty(0, device=device)))
        return make_batch(self.trainer, ids.to(device), inputs, nothing, kl=0.0, **self.context())

    def pick(self, inputs: dict[str, Any], metrics: Metrics) -> dict[str, Any]:
        """Scores an oversized candidate batch without gradient and returns the rows to train on."""
        (method,) = self.methods.using("pick")
        own_ids = per_example(inputs[EXAMPLE_ID].cpu(), self.kind.layout)
        if ROW_LENGTHS in inputs:
            inputs = {**inputs, ROW_LENGTHS: inputs[ROW_LENGTHS].flatten()}
        with self.run.costs.collecting() as ran:
            candidates = (
                self.score_rows(inputs, own_ids, reference=method.references)
                if method.scores_candidates
                else self.unscored(inputs, own_ids)
            )
        ids, _ = candidates.gather(candidates.ids)
        tokens, _ = candidates.gather(torch.tensor([token_count(inputs)], device=candidates.ids.device))
        self.run.costs.add_all(ran, len(ids), int(tokens.sum()))
        positions = method.pick(self.run, candidates).cpu()
        rank, world = self.trainer.accelerator.process_index, self.trainer.accelerator.num_processes
        if len(positions) < world:
            # The last candidates of an epoch may be too few to choose from: every rank still trains one of them.
            rest = np.setdiff1d(np.arange(len(ids)), positions.numpy())
            positions = torch.cat([positions, torch.from_numpy(rest)])[:world]
        chosen = ids.cpu()[positions]
        share = len(chosen) // world
        own = chosen[rank * share : (rank + 1) * share]
        metrics.picked(ids.cpu().numpy(), chosen[: share * world].numpy())
        # The chosen rows may lie on another rank: each rank collates its share from the dataset.
        batch = self.run.rows.collate(own.numpy())
        batch[EXAMPLE_ID] = per_row(own.to(inputs[EXAMPLE_ID].device), len(batch["input_ids"]))
        return batch

    def gather(self, values: Tensor) -> tuple[Tensor, slice]:
        accelerator = self.trainer.accelerator
        if accelerator.num_processes == 1:
            return values, slice(0, len(values))
        sizes = accelerator.gather(torch.tensor([len(values)], device=accelerator.device)).tolist()
        padded = values.new_zeros((max(sizes), *values.shape[1:]))
        padded[: len(values)] = values
        gathered = accelerator.gather(padded.to(accelerator.device)).view(len(sizes), max(sizes), *values.shape[1:])
        start = sum(sizes[: accelerator.process_index])
        rows = torch.cat([gathered[rank, :size] for rank, size in enumerate(sizes)])
        return rows, slice(start, start + len(values))

    def clipped(self, norm: Any) -> None:
        """The gradient of the step had this norm before it was clipped."""
        factor = self.trainer.args.max_grad_norm / (float(norm) + 1e-6)
        # Not so for a norm that is no number.
        self._made["clip_factor"] = min(1.0, factor) if factor == factor else float("nan")

    def about_to_move(self) -> None:
        """The gradient of the step is whole; clipping and the optimizer come next."""
        self.gradients.step_done()
        self._made["learning_rate"] = float(self.trainer.optimizer.param_groups[0]["lr"])

    def exchange(self) -> Step | None:
        """All ranks' rows of this step, in one gather of int64 words (the floats travel as their bits)."""
        rows, self._rows = self._rows, []
        if not rows:
            return None
        names = [name for name in rows[0] if name != "ids"]
        words = [torch.cat([row["ids"] for row in rows]).long()]
        for name in names:
            words.append(torch.cat([row[name].detach().float() for row in rows]).view(torch.int32).long())
        table = torch.stack([word.to(words[0].device) for word in words], dim=1)
        table = self.gather(table)[0].cpu()
        values = table[:, 1:].to(torch.int32).contiguous().view(torch.float32)
        skipped = bool(self.trainer.accelerator.optimizer_step_was_skipped)
        columns = {name: values[:, i].numpy() for i, name in enumerate(names)}
        return Step(table[:, 0].numpy(), columns, **self._made, skipped=skipped)


def _times(first: Tensor, second: Tensor) -> Tensor:
    """Product of two weights in row layout, of which one may be per token."""
    if first.dim() < second.dim():
        first = first.unsqueeze(1)
    elif second.dim() < first.dim():
        second = second.unsqueeze(1)
    return first * second
