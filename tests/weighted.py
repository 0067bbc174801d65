"""One gated optimizer step, and the same gradient put together from one backward pass per example."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import TrainerCallback

from dsel_trl import Method, SelectionCallback
from dsel_trl.signals.sequence_batch import SequenceBatch
from tests import tiny

# Weights by example id: small, large, zero, and all different.
WEIGHTS = np.random.default_rng(5).uniform(0.1, 3.0, size=40).astype(np.float32)
WEIGHTS[::7] = 0.0
COLUMNS = {"dpo": ("chosen", "rejected"), "sft": ("completion",), "kto": ("completion",)}


def half_weighted(kind, swapped=False, even=False):
    """
    Every second example has weight 0; with `swapped` its responses are others of as many words. With `even` all texts
    are equally long, so that a model is compiled once.
    """
    rows = tiny.DATASETS[kind](16).to_list()
    for i, row in enumerate(rows):
        row["weight"] = float(i % 2)
        for name in ("prompt", *COLUMNS[kind]) if even else ():
            row[name] = " " + " ".join((row[name].split() * 6)[:6])
        if swapped and not i % 2:
            for name in COLUMNS[kind]:
                row[name] = " " + " ".join(reversed(row[name].split()))
    return Dataset.from_list(rows)


@dataclass
class FixedWeights(Method):
    """Gives each example the weight that stands in a table, and keeps what it saw."""

    weights: Any = None
    normalize: str = "none"
    seen: list = field(default_factory=list, init=False)

    name = "fixed_weights"
    trainers = ("dpo", "sft", "kto")

    def weigh(self, batch):
        margin = None if isinstance(batch, SequenceBatch) else batch.implicit_margin
        self.seen.append(
            {"ids": batch.ids.clone(), "loss": batch.loss, "margin": margin, "inputs": dict(batch.inputs)}
        )
        return torch.from_numpy(self.weights)[batch.ids]


class KeepGradients(TrainerCallback):
    """Copies the gradients the optimizer is about to use."""

    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = gradients(model)


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix("module."): parameter.grad.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


@dataclass
class Outcome:
    """What one gated step did, and what it should have done."""

    gated: dict[str, torch.Tensor]
    explicit: dict[str, torch.Tensor]
    logs: dict[str, float]
    losses: torch.Tensor
    margins: torch.Tensor | None

    @property
    def error(self) -> float:
        """Largest relative difference of a parameter's gradient."""
        assert self.gated.keys() == self.explicit.keys()
        assert self.gated
        scale = max(float(g.norm()) for g in self.explicit.values())
        assert scale > 0
        # Parameters whose gradient is rounding of zero are measured against the largest gradient.
        return max(
            float((self.gated[name] - g).norm() / max(float(g.norm()), 1e-2 * scale))
            for name, g in self.explicit.items()
        )


def one_step(
    trainer: Any, weights: np.ndarray = WEIGHTS, normalize: str = "none", stir: bool = True
) -> tuple[dict[str, torch.Tensor], FixedWeights, dict[str, float]]:
    """Trains the first optimizer step with learning rate 0 behind the gate."""
    if stir:
        tiny.stir(trainer)
    method, keep = FixedWeights(weights, normalize), KeepGradients()
    trainer.add_callback(keep)
    trainer.add_callback(SelectionCallback(trainer, method))
    trainer.train()
    logs = trainer.state.log_history[0]
    trainer.selection.detach()
    return keep.gradients, method, logs


def explicit_gradient(
    trainer: Any, micro_batches: list[dict[str, Any]], weights: list[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """
    Weighted sum of per-example gradients, each of the stock trainer's loss of that example alone.

    `micro_batches` are the collated batches of one optimizer step (over all ranks), `weights` those of their examples.
    """
    total: dict[str, torch.Tensor] = {}
    trainer.model.train()
    is_preference = hasattr(trainer, "beta")
    tokens = None if is_preference else sum((batch["labels"][:, 1:] != -100).sum() for batch in micro_batches)
    for batch, batch_weights in zip(micro_batches, weights, strict=True):
        for alone, share in alone_with_share(trainer, batch, tokens):
            trainer.model.zero_grad()
            loss = trainer.compute_loss(trainer.model, alone, num_items_in_batch=tokens)
            loss.backward()
            index = share[0]
            # Tokens are counted over all ranks, and the trainer multiplies by their number what DDP then averages.
            scale = 1 / len(micro_batches) if is_preference else 1 / trainer.accelerator.num_processes
            factor = float(batch_weights[index]) * share[1] * scale
            for name, gradient in gradients(trainer.model).items():
                total[name] = total.get(name, 0.0) + factor * gradient.double()
    trainer.model.zero_grad()
    return {name: gradient.float() for name, gradient in total.items()}


def alone_with_share(trainer: Any, batch: dict[str, Any], tokens: Any) -> Any:
    """Each example of a micro-batch as a batch of its own, with its position and its share of the batch's mean."""
    if "label" in batch:
        size = len(batch["label"])
        # The KL term is a number of the whole batch: each response alone keeps all its rows.
        whole = {key: value for key, value in batch.items() if "KL_" in key}
        for i in range(size):
            yield {**{key: value[[i]] for key, value in batch.items() if key not in whole}, **whole}, (i, 1.0 / size)
    elif tokens is None:
        size = batch["input_ids"].shape[0] // 2
        # TRL's `sft` loss is the mean over the chosen tokens of the batch: a long response counts more.
        chosen_tokens = batch["completion_mask"][:size, 1:].sum(dim=1).double()
        token_mean = trainer.loss_types == ["sft"]
        for i in range(size):
            rows = {
                key: value[[i]] if value.shape[0] == size else value[[i, size + i]] for key, value in batch.items()
            }
            yield rows, (i, float(chosen_tokens[i] / chosen_tokens.sum()) if token_mean else 1.0 / size)
    elif "position_ids" in batch:
        starts = torch.nonzero(batch["position_ids"][0] == 0).flatten().tolist()
        for i, (start, end) in enumerate(zip(starts, [*starts[1:], batch["input_ids"].shape[1]], strict=True)):
            rows = {key: batch[key][:, start:end] for key in ("input_ids", "labels")}
            yield {**rows, "attention_mask": torch.ones_like(rows["input_ids"])}, (i, 1.0)
    else:
        for i in range(batch["input_ids"].shape[0]):
            yield {key: value[[i]] for key, value in batch.items() if torch.is_tensor(value)}, (i, 1.0)


def normalized(weights: list[torch.Tensor], normalize: str) -> list[torch.Tensor]:
    """Weights as the gate is to apply them: with `mean1` they average 1 over the optimizer step."""
    if normalize == "none":
        return weights
    mean = torch.cat(weights).double().mean()
    return [w / mean for w in weights]


def compare(trainer: Any, weights: np.ndarray = WEIGHTS, normalize: str = "none") -> Outcome:
    """Runs one gated step and puts the same gradient together example by example."""
    gated, method, logs = one_step(trainer, weights, normalize)
    count = trainer.args.gradient_accumulation_steps
    seen = method.seen[:count]
    table = [torch.from_numpy(weights)[micro["ids"]] for micro in seen]
    explicit = explicit_gradient(trainer, [micro["inputs"] for micro in seen], normalized(table, normalize))
    margins = None if seen[0]["margin"] is None else torch.cat([micro["margin"] for micro in seen])
    return Outcome(gated, explicit, logs, torch.cat([micro["loss"] for micro in seen]), margins)
