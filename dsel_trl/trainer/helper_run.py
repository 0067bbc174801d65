"""Proxy models: short runs of the trainer's own algorithm on part of the data, to score the rest."""

import copy
import gc
import logging
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from peft import LoraConfig
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, TrainerCallback

from ..core.randomness import preserved_rng
from ..signals.batch import Batch
from . import mixin as seams
from .forwards import base_model, score_rows
from .kinds import forwards_without_gradient, trainer_kind

logger = logging.getLogger(__name__)

# What of the run's own arguments a proxy run shares: the loss, the precision and the truncation.
SHARED_ARGUMENTS = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_length",
    "truncation_mode",
    "loss_type",
    "beta",
    "label_smoothing",
    "bf16",
    "fp16",
    "use_cpu",
    "gradient_checkpointing",
    "optim",
    "weight_decay",
    "max_grad_norm",
    "dataloader_num_workers",
)
LORA: dict[str, Any] = {
    "r": 16,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "target_modules": "all-linear",
    "task_type": "CAUSAL_LM",
}


def train_proxy(
    trainer: Any,
    train_ids: np.ndarray,
    score_ids: np.ndarray,
    measure: Callable[[Batch], Tensor],
    *,
    evaluations: int = 5,
    epochs: float = 1.0,
    learning_rate: float | None = None,
    lora: bool = True,
    seed: int = 0,
    model: str | None = None,
    evaluate: Callable[[Callable[..., Batch]], np.ndarray] | None = None,
    description: str = "Proxy",
) -> np.ndarray:
    """
    Trains a copy of the initial policy on `train_ids` and measures `score_ids` with it while it trains.

    Args:
        trainer ([`~trl.DPOTrainer`] or [`~trl.SFTTrainer`]):
            The run's trainer; its class, loss, precision and data are used, its model is copied and left alone.
        train_ids, score_ids (`np.ndarray`):
            Examples to train on and to measure.
        measure (`Callable[[Batch], Tensor]`):
            Gives `(B,)` values of a scored batch.
        evaluations (`int`, *optional*, defaults to `5`):
            How often to measure, evenly over the run; the last time after its end at the latest.
        epochs (`float`, *optional*, defaults to `1.0`):
            Length of the proxy run.
        learning_rate (`float`, *optional*):
            Defaults to the run's own.
        lora (`bool`, *optional*, defaults to `True`):
            LoRA of rank 16 on all linear layers, or full fine-tuning.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the proxy run. The global generators are left as they were.
        model (`str`, *optional*):
            Another (smaller) model to train, by folder or hub id; it must share the policy's tokenizer. Defaults to a
            copy of the policy as it is now.
        evaluate (`Callable`, *optional*):
            Called with the helper's forward instead of measuring: for passes over other rows than the trainer's, or
            over tokens.

    Returns:
        `np.ndarray` of shape `(evaluations, len(score_ids))`, float32; with `evaluate`, what it returns, stacked.
    """
    arguments = trainer.args
    shared = {name: getattr(arguments, name) for name in SHARED_ARGUMENTS if hasattr(arguments, name)}
    with tempfile.TemporaryDirectory(prefix="dsel_proxy_") as folder, preserved_rng():
        args = type(arguments)(
            folder,
            **shared,
            learning_rate=arguments.learning_rate if learning_rate is None else learning_rate,
            num_train_epochs=epochs,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            seed=seed,
        )
        stock = seams.stock_class(type(trainer))
        kwargs: dict[str, Any] = {"peft_config": LoraConfig(**LORA)} if lora else {}
        if not lora and trainer_kind(trainer) == "dpo":
            kwargs["ref_model"] = _start(trainer, model)
        proxy = _prepared(stock)(
            model=_start(trainer, model),
            args=args,
            train_dataset=trainer.train_dataset.select(np.sort(train_ids)),
            processing_class=trainer.processing_class,
            **kwargs,
        )
        recorder = _Recorder(trainer, proxy, score_ids, measure, evaluations, description, evaluate)
        proxy.add_callback(recorder)
        proxy.train()
        recorder.finish()
        _count(trainer, proxy, train_ids)
        values = np.stack(recorder.values)
        del proxy, recorder
        gc.collect()
    return values


def _count(trainer: Any, proxy: Any, train_ids: np.ndarray) -> None:
    """Counts the training of a helper: forward, backward, and what its loss takes without gradient."""
    run = trainer.selection.run
    examples, tokens = (proxy.state.epoch * n for n in (len(train_ids), int(run.lengths[train_ids].sum())))
    silent = forwards_without_gradient(proxy)
    run.costs.add("helper_forwards", examples, tokens)
    run.costs.add("helper_reference_forwards", silent * examples, silent * tokens)
    run.costs.add("helper_backwards", examples, tokens)
    run.costs.add("helper_runs", 1)
    run.costs.add("helper_steps", proxy.state.global_step)


class _Recorder(TrainerCallback):
    def __init__(
        self,
        trainer: Any,
        proxy: Any,
        ids: np.ndarray,
        measure: Callable[[Batch], Tensor],
        evaluations: int,
        description: str,
        evaluate: Callable[[Callable[..., Batch]], np.ndarray] | None,
    ) -> None:
        self.trainer, self.proxy, self.evaluate = trainer, proxy, evaluate
        self.ids, self.measure, self.evaluations = ids, measure, evaluations
        self.description = description
        self.interval = 1
        self.values: list[np.ndarray] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.interval = max(state.max_steps // self.evaluations, 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.interval == 0 and len(self.values) < self.evaluations:
            self._evaluate()

    def finish(self) -> None:
        """A run with fewer steps than evaluations fills the rest with its final model."""
        while len(self.values) < self.evaluations:
            self.values.append(self.values[-1]) if self.values else self._evaluate()

    def _evaluate(self) -> None:
        selection = self.trainer.selection
        forward = partial(
            score_rows, self.proxy, costs=selection.run.costs, who="helper_", **selection.steps.context()
        )
        if self.evaluate is not None:
            self.values.append(self.evaluate(forward))
            return
        values = selection.run.passes.measure(
            self.measure,
            self.ids,
            forward=forward,
            description=f"{self.description} {len(self.values) + 1}/{self.evaluations}",
        )
        self.values.append(values)


def _prepared(stock: type) -> type:
    """The trainer class for data that is prepared already."""
    return type(
        f"Proxy{stock.__name__}", (stock,), {"_prepare_dataset": lambda self, dataset, *args, **kwargs: dataset}
    )


def _start(trainer: Any, path: str | None) -> nn.Module:
    """The model that a proxy run starts from."""
    if path is None:
        return initial_copy(trainer)
    base = base_model(trainer)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=base.dtype)
    if model.config.vocab_size < len(trainer._tokenizer):
        raise ValueError(
            f"The helper model {path!r} knows {model.config.vocab_size} tokens, the run's tokenizer has "
            f"{len(trainer._tokenizer)}: it must share the policy's tokenizer."
        )
    return model.to(base.device)


def initial_copy(trainer: Any) -> nn.Module:
    """
    A new model with the weights that the policy has now, without its adapter.

    Never a deep copy: TRL's fused head is a closure over the original model.

    Raises:
        `ValueError`: for a quantised model, whose weights cannot be copied into a plain one.
    """
    base = base_model(trainer)
    if getattr(base, "is_loaded_in_4bit", False) or getattr(base, "is_loaded_in_8bit", False):
        raise ValueError("A quantised model cannot be copied for a proxy run: give the scores as a dataset column.")
    model = type(base)(copy.deepcopy(base.config)).to(device=base.device, dtype=base.dtype)
    state = {
        name.replace(".base_layer.", "."): value for name, value in base.state_dict().items() if ".lora_" not in name
    }
    model.load_state_dict(state)
    model.generation_config = copy.deepcopy(base.generation_config)
    return model
