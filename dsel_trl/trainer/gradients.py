"""Per-example gradients of a training step, and gradients beside it: of a target, of the step, by a moved model."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ..core.composition import Composition
from ..core.costs import Costs
from ..core.method import Method
from ..core.run import Run
from ..data.rows import Rows
from ..signals.batch import ROW_LENGTHS, Batch
from ..signals.ghost import Direction, ExampleGradients, GhostRecorder, GradientRequest
from ..signals.ghost_layers import Examples
from .forwards import evaluating
from .kinds import trainer_kind
from .single_gradients import SingleGradients

# How far a model is moved to see how its gradients change, as a share of the norm of its parameters: far enough for
# float32, near enough for the gradients to change in proportion.
MOVE = 3e-4


class ModelGradients(SingleGradients):
    """
    Gradients of the policy beside its training; all ranks must make the same calls (`run.gradients`).

    Gradients are mappings from names of parameters to tensors in float32, of sharded parameters DTensors that are
    sharded alike. The parameters' own `grad` is what it was afterwards.

    Args:
        trainer:
            The re-typed trainer.
        costs ([`Costs`]):
            Where forwards and backwards are counted.
        score (`Callable[..., Batch]`):
            Runs a collated batch through the models ([`~dsel_trl.trainer.step.OptimizerStep.score_rows`]).
    """

    def __init__(self, trainer: Any, costs: Costs, score: Callable[..., Batch]) -> None:
        self.trainer, self.costs, self.score = trainer, costs, score
        self._recorder: GhostRecorder | None = None

    @property
    def recorder(self) -> GhostRecorder:
        """What listens to the layers of the model as it is now: FSDP may put it into another one."""
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        if self._recorder is None or self._recorder.model is not model:
            self._recorder = GhostRecorder(model)
        return self._recorder

    def close(self) -> None:
        """Lets go of the model's layers, where a step has ended half way."""
        if self._recorder is not None:
            self._recorder.close()

    def layers(self, spec: str | Sequence[str]) -> list[str]:
        """
        Names of the layers that `spec` means ([`~dsel_trl.signals.ghost_layers.choose_layers`]).

        Raises:
            `ValueError`: where it means none, or one whose per-example gradients are not known.
        """
        return [layer.name for layer in self.recorder.layers(spec)]

    def parameters(self, spec: str | Sequence[str]) -> dict[str, Tensor]:
        """The parameters of the layers that `spec` means, by name."""
        _in_shards(self.recorder.model)
        named = dict(self.recorder.model.named_parameters())
        return {name: named[name] for name in self.recorder.parameters(spec)}

    @property
    def loss_scale(self) -> float:
        """What the loss is multiplied by before the backward pass (float16)."""
        scaler = self.trainer.accelerator.scaler
        return float(scaler.get_scale()) if scaler is not None else 1.0

    def of(
        self, rows: Rows, ids: np.ndarray | None = None, *, layers: str | Sequence[str], mean: bool = True
    ) -> dict[str, Tensor]:
        """
        Gradient of the mean (or sum) of the losses of examples, by the parameters of `layers`, in evaluation mode.

        Args:
            rows ([`~dsel_trl.data.rows.Rows`]):
                The examples; `ids` which of them, all by default.
            layers (`str` or `Sequence[str]`):
                By whose parameters.
            mean (`bool`, *optional*, defaults to `True`):
                Whether the mean is taken.

        One forward (and one of the reference, where its log-probabilities are not in the data) and one backward per
        example, shared by the ranks, in batches of `per_device_train_batch_size`.
        """
        ids = np.arange(len(rows)) if ids is None else np.asarray(ids, dtype=np.int64)
        parameters = self.parameters(layers)
        total = {name: torch.zeros_like(value, dtype=torch.float32) for name, value in parameters.items()}
        with self.costs.collecting() as ran, self.grads_put_back(), evaluating(self.trainer):
            for own, counts in self._shares(ids):
                loss = self.score(rows.collate(own), torch.from_numpy(own), gradient=True).loss
                self.add_gradient(total, parameters, loss.sum() * float(counts))
        tokens = int(rows.pass_lengths[ids].sum())
        # As many ranks as there are have run the first batch; each example is counted once.
        self.costs.add_all(dict.fromkeys(ran, 1), len(ids), tokens)
        self.costs.add("backwards", len(ids), tokens)
        return self._over_ranks(total, 1.0 / len(ids) if mean else 1.0)

    def _shares(self, ids: np.ndarray) -> Iterator[tuple[np.ndarray, bool]]:
        """This rank's batches of `ids`; all ranks run as many, some of them one that does not count."""
        accelerator, size = self.trainer.accelerator, self.trainer.args.per_device_train_batch_size
        rank, world = accelerator.process_index, accelerator.num_processes
        for start in range(0, len(ids), size * world):
            share = np.array_split(ids[start : start + size * world], world)[rank]
            yield (share, True) if len(share) else (ids[:1], False)

    def add_gradient(self, total: dict[str, Tensor], parameters: dict[str, Tensor], loss: Tensor) -> None:
        if not self._sharded(parameters):
            found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            for name, value in zip(parameters, found, strict=True):
                if value is not None and name in total:
                    total[name] += value
            return
        # What is sharded has its gradient put together by hooks that act on `grad`; they add to what is there.
        loss.backward()
        for name, value in parameters.items():
            if value.grad is not None and name in total:
                # The mean over the ranks has been taken.
                total[name] += value.grad.float() * self.trainer.accelerator.num_processes
                value.grad = None

    @contextlib.contextmanager
    def grads_put_back(self) -> Iterator[None]:
        """Begins with no `grad` and ends with what there was; sharded parameters are other objects in a forward."""
        _in_shards(self.recorder.model)
        parameters = list(self.recorder.model.parameters())
        held = [value.grad for value in parameters]
        for value in parameters:
            value.grad = None
        try:
            yield
        finally:
            for value, grad in zip(parameters, held, strict=True):
                value.grad = grad

    @staticmethod
    def _sharded(parameters: dict[str, Tensor]) -> bool:
        return any(isinstance(value, DTensor) for value in parameters.values())

    def _over_ranks(self, total: dict[str, Tensor], factor: float) -> dict[str, Tensor]:
        accelerator = self.trainer.accelerator
        if accelerator.num_processes > 1 and not self._sharded(total):
            flat = accelerator.reduce(torch.cat([value.flatten() for value in total.values()]), "sum")
            pieces = flat.split([value.numel() for value in total.values()])
            total = {name: piece.view_as(total[name]) for name, piece in zip(total, pieces, strict=True)}
        return {name: value * factor for name, value in total.items()}

    def of_step(self, layers: str | Sequence[str]) -> dict[str, Tensor]:
        """Gradient of the step that is about to be made, over all ranks and micro-batches, before it is clipped."""
        found = {}
        for name, value in self.parameters(layers).items():
            grad = torch.zeros_like(value) if value.grad is None else value.grad
            found[name] = grad.detach().float() / self.loss_scale
        return found

    def curvature(self, direction: Direction, gradient: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """
        Product of the Hessian of a loss with a direction: how its gradient changes along it, by central differences.

        Args:
            direction (`Mapping[str, torch.Tensor]`):
                By the names of parameters.
            gradient (`Callable[[], dict[str, torch.Tensor]]`):
                Works out the gradient of the loss by these parameters; called twice, with the model moved.

        Raises:
            `ValueError`: for parameters in half precision, which cannot be moved by so little.
        """
        named = dict(self.recorder.model.named_parameters())
        parameters: dict[str, Tensor] = {name: named[name] for name in direction}
        if coarse := sorted(
            {str(p.dtype) for p in parameters.values() if p.dtype not in (torch.float32, torch.float64)}
        ):
            raise ValueError(
                f"The curvature along a direction is seen by moving the parameters a little, which {coarse} rounds "
                "away: train parameters in float32 (with bf16=True they may be used in bfloat16), or use first order."
            )
        norm = _norm(direction)
        if norm == 0:
            return {name: torch.zeros_like(value) for name, value in direction.items()}
        step = MOVE * max(_norm(parameters), 1.0) / norm
        before = {name: value.detach().clone() for name, value in parameters.items()}
        found = []
        with self._put_back(parameters, before):
            for side in (step, -step):
                with torch.no_grad():
                    for name, value in parameters.items():
                        value.copy_(before[name] + side * direction[name])
                found.append(gradient())
        return {name: (found[0][name] - found[1][name]) / (2 * step) for name in direction}

    @staticmethod
    @contextlib.contextmanager
    def _put_back(parameters: dict[str, Tensor], before: dict[str, Tensor]) -> Iterator[None]:
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in parameters.items():
                    value.copy_(before[name])

    def check_second_moments(self) -> None:
        """Raises `ValueError` where the optimizer is none that keeps second moments as Adam does."""
        optimizer, name = (
            self.trainer.optimizer,
            str(getattr(self.trainer.args.optim, "value", self.trainer.args.optim)),
        )
        known = (
            name.startswith("adamw_") and "bit" not in name if optimizer is None else self._keeps_moments(optimizer)
        )
        if not known:
            what = f"optim={name!r}" if optimizer is None else type(optimizer).__name__
            raise ValueError(
                f"The second moments of Adam are asked for, which {what} does not keep in full: train with "
                "optim='adamw_torch', or leave precondition='none'."
            )

    @staticmethod
    def _keeps_moments(optimizer: Any) -> bool:
        states = [state for state in optimizer.state.values() if state]
        if states:
            return all("exp_avg_sq" in state for state in states)
        return all({"betas", "eps"} <= set(group) for group in optimizer.param_groups)

    def second_moments(self, layers: str | Sequence[str]) -> dict[str, tuple[Tensor, float]] | None:
        """
        Adam's second moments of the parameters of `layers`, without its bias, each with the optimizer's `eps`.

        `None` before the optimizer has made a step.

        Raises:
            `ValueError`: for an optimizer without them.
        """
        optimizer = self.trainer.optimizer
        if optimizer is None or not any(optimizer.state.values()):
            return None
        self.check_second_moments()
        groups = {id(value): group for group in optimizer.param_groups for value in group["params"]}
        found = {}
        for name, value in self.parameters(layers).items():
            state, group = optimizer.state[value], groups[id(value)]
            bias = 1.0 - group["betas"][1] ** float(state["step"])
            found[name] = (state["exp_avg_sq"].float() / bias, float(group["eps"]))
        return found


def _in_shards(model: torch.nn.Module) -> None:
    """
    Puts the shards in place where FSDP2 has left parameters whole, as it does after a forward without gradient.

    Gradients lie at the shards, which are other objects.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _norm(values: Direction) -> float:
    total = sum((_square(value) for value in values.values()), 0.0)
    return total**0.5


def _square(value: Tensor) -> float:
    square = value.detach().double().square().sum()
    return float(square.full_tensor() if isinstance(square, DTensor) else square)


class StepGradients:
    """
    What methods ask of the gradients of one optimizer step's examples.

    Args:
        trainer:
            The re-typed trainer.
        methods ([`Composition`]):
            The methods of the run.
        run ([`Run`]):
            The run they see.
    """

    def __init__(self, trainer: Any, methods: Composition, run: Run) -> None:
        self.trainer, self.run = trainer, run
        self.methods = methods.using("after_backward")
        self.kind = trainer_kind(trainer)
        self._requests: list[tuple[Method, GradientRequest]] = []
        self._open: list[ExampleGradients] = []
        self._waiting: list[tuple[Batch, dict[str, Tensor], list[ExampleGradients]]] = []

    def begin(self) -> None:
        """Before the forwards of a step: asks the methods what they want of it."""
        self._requests, self._waiting = [], []
        for method in self.methods:
            with self.run.costs.clock():
                request = method.gradients(self.run)
            if request is not None:
                self._requests.append((method, request))

    def listen(self, ids: Tensor, inputs: dict[str, Any]) -> None:
        """Before the forward of a micro-batch."""
        if self._requests:
            rows, length = inputs["input_ids"].shape
            examples = Examples(ids.numel(), rows, length, inputs.get(ROW_LENGTHS))
            self._open = self.run.gradients.recorder.listen([request for _, request in self._requests], examples)

    def forward_done(self, batch: Batch, weights: Tensor | None, items: Any) -> None:
        """Between the forward and the backward of a micro-batch, whose weights and normaliser are known now."""
        if not self._requests:
            return
        # Factor of each example's loss in what is back-propagated, and in the step's gradient over all ranks.
        local = self._coefficients(batch, items)
        scale = 1.0 / (local * self.run.gradients.loss_scale * _known_weights(batch, weights))
        scale = torch.where(scale.isfinite(), scale, torch.nan)
        self.run.gradients.recorder.scaled(scale, local / self.run.world)

    def _coefficients(self, batch: Batch, items: Any) -> Tensor:
        steps = 1 if items is not None else self.trainer.current_gradient_accumulation_steps
        if not self.kind.token_mean:
            steps = self.trainer.current_gradient_accumulation_steps
            return torch.full((batch.size,), 1.0 / (batch.size * steps), device=batch.ids.device)
        tokens = batch.lengths.float()
        if items is None:
            return tokens / (tokens.sum().clamp(min=1) * steps)
        ranks = self.run.world if self.trainer.args.average_tokens_across_devices else 1
        return tokens * ranks / torch.as_tensor(items, device=tokens.device).clamp(min=1)

    def backward_done(self, batch: Batch | None, row: dict[str, Tensor]) -> None:
        """After the backward pass of a micro-batch; `row` is where its values go."""
        if not self._requests or batch is None:
            return
        recorder = self.run.gradients.recorder
        try:
            recorder.check()
        finally:
            found, self._open = self._open, []
            recorder.close()
        self._waiting.append((batch, row, found))

    def step_done(self) -> None:
        """After the last backward pass of a step, before the optimizer moves."""
        waiting, self._waiting = self._waiting, []
        for batch, row, found in waiting:
            for (method, _), gradients in zip(self._requests, found, strict=True):
                with self.run.costs.clock():
                    row.update(method.after_backward(self.run, batch, gradients))
                gradients.free()


def _known_weights(batch: Batch, weights: Tensor | None) -> Tensor:
    """Weight of each example in the gradient, `(B,)`; NaN where it has not one weight, or none at all."""
    one = torch.ones(batch.size, device=batch.ids.device)
    if weights is None:
        return one
    weights = weights.float()
    means = batch.example_weights(weights)
    again = batch.row_weights(means)
    if again.dim() < weights.dim():
        again = again.unsqueeze(1)
    apart = ((again - weights).abs() > 1e-6 * weights.abs()).float()
    return torch.where((batch.example_weights(apart) > 0) | (means == 0), torch.nan, means)
