"""Helper models: short runs of the trainer's own algorithm on part of the data, to score the rest."""

import copy
import gc
import logging
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, TrainerCallback

from ..core.helper_settings import LORA, LORA_LEARNING_RATE, helper_arguments
from ..core.randomness import preserved_rng
from ..signals.batch import Batch
from ..signals.kto_batch import KTOBatch
from ..signals.pair_batch import PairBatch
from . import mixin as seams
from .forwards import base_model, score_rows
from .kinds import trainer_kind

logger = logging.getLogger(__name__)

# Layers of a model that an adapter has changed.
ADAPTED = (BaseTunerLayer, AuxiliaryTrainingWrapper)


def train_helper(
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
    description: str = "Helper model",
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
            Length of the helper run.
        learning_rate (`float`, *optional*):
            Defaults to `3e-4` with LoRA, and to the run's own without.
        lora (`bool`, *optional*, defaults to `True`):
            LoRA of rank 16 on all linear layers, or full fine-tuning.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the helper run. The global generators are left as they were.
        model (`str`, *optional*):
            Another (smaller) model to train, by folder or hub id; it must share the policy's tokenizer. Defaults to a
            copy of the policy as it is now.
        evaluate (`Callable`, *optional*):
            Called with the helper's forward instead of measuring: for passes over other rows than the trainer's, or
            over tokens.

    Returns:
        `np.ndarray` of shape `(evaluations, len(score_ids))`, float32; with `evaluate`, what it returns, stacked.
    """
    arguments = helper_arguments(trainer.args, learning_rate=learning_rate, epochs=epochs, lora=lora, seed=seed)
    with tempfile.TemporaryDirectory(prefix="dsel_helper_") as folder, preserved_rng():
        args = type(trainer.args)(folder, **arguments)
        stock = seams.stock_class(type(trainer))
        kwargs: dict[str, Any] = {"peft_config": LoraConfig(**LORA)} if lora else {}
        if not lora and trainer_kind(trainer).references:
            kwargs["ref_model"] = _start(trainer, model)
        helper = _prepared(stock)(
            model=_start(trainer, model),
            args=args,
            train_dataset=_without_references(trainer).select(np.sort(train_ids)),
            processing_class=trainer.processing_class,
            **kwargs,
        )
        recorder = _Recorder(trainer, helper, score_ids, measure, evaluations, description, evaluate)
        helper.add_callback(recorder)
        helper.train()
        recorder.finish()
        recorder.tell_rounding()
        _count(trainer, helper, train_ids)
        values = np.stack(recorder.values)
        del helper, recorder
        gc.collect()
    return values


def _count(trainer: Any, helper: Any, train_ids: np.ndarray) -> None:
    """Counts the training of a helper: forward, backward, and what its loss takes without gradient."""
    run = trainer.selection.run
    examples, tokens = (helper.state.epoch * n for n in (len(train_ids), int(run.lengths[train_ids].sum())))
    silent = trainer_kind(helper).forwards_without_gradient(helper)
    run.costs.add("helper_forwards", examples, tokens)
    run.costs.add("helper_reference_forwards", silent * examples, silent * tokens)
    run.costs.add("helper_backwards", examples, tokens)
    run.costs.add("helper_runs", 1)
    run.costs.add("helper_steps", helper.state.global_step)


class _Recorder(TrainerCallback):
    def __init__(
        self,
        trainer: Any,
        helper: Any,
        ids: np.ndarray,
        measure: Callable[[Batch], Tensor],
        evaluations: int,
        description: str,
        evaluate: Callable[[Callable[..., Batch]], np.ndarray] | None,
    ) -> None:
        self.trainer, self.helper, self.evaluate = trainer, helper, evaluate
        self.ids, self.measure, self.evaluations = ids, measure, evaluations
        self.description = description
        self.interval = 1
        self.values: list[np.ndarray] = []
        # Of the pairs measured last: how far the helper has moved from its start, and what it moved from.
        self.moved: list[Tensor] = []
        self.logps: list[Tensor] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.interval = max(state.max_steps // self.evaluations, 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.interval == 0 and len(self.values) < self.evaluations:
            self._evaluate()

    def finish(self) -> None:
        """A run with fewer steps than evaluations fills the rest with its final model."""
        while len(self.values) < self.evaluations:
            self.values.append(self.values[-1]) if self.values else self._evaluate()

    def tell_rounding(self) -> None:
        """Warns where a helper has moved no further from its start than its precision rounds."""
        args = self.helper.args
        precision = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
        half = torch.finfo(precision).eps / 2
        moved: float | None
        if self.moved:
            what, moved = "its log-ratios spread by", torch.cat(self.moved).std(correction=0).item()
            rounding = half * torch.cat(self.logps).abs().mean().item()
        else:
            # Without a reference nothing says what its start would have measured, but its weights say how far it is.
            what, moved, rounding = "its weights have changed by a share of", self._weight_change(), half
        if moved is not None and moved <= rounding:
            logger.warning(
                "A helper model has learned next to nothing at the learning rate %g: %s %.2g, and %s alone rounds by "
                "%.2g. What it measured is noise: set a larger helper_learning_rate (the default of LoRA helpers is "
                "%g), or more helper_epochs.",
                args.learning_rate,
                what,
                moved,
                str(precision).removeprefix("torch."),
                rounding,
                LORA_LEARNING_RATE,
            )

    @torch.no_grad()
    def _weight_change(self) -> float | None:
        """Size of what an adapter has learned against that of the weights beneath; `None` without an adapter."""
        model = self.helper.accelerator.unwrap_model(self.helper.model)
        layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
        pairs = [
            (layer.get_delta_weight(name), layer.get_base_layer().weight)
            for layer in layers
            for name in layer.active_adapters
            if hasattr(layer, "get_delta_weight")
        ]
        if not pairs:
            return None
        learned, beneath = (
            sum(float(part.float().square().sum()) for part in each) for each in zip(*pairs, strict=True)
        )
        return (learned / beneath) ** 0.5 if beneath else None

    def _forward(self, *args: Any, **kwargs: Any) -> Batch:
        batch = _score_by_own_reference(self.helper, *args, **kwargs)
        if isinstance(batch, PairBatch) and trainer_kind(self.helper).margin and kwargs.get("reference", True):
            self.moved.append(batch.log_ratio_margin.detach().float().cpu())
            self.logps.append(batch.policy_chosen_logps.detach().float().cpu())
        elif isinstance(batch, KTOBatch) and kwargs.get("reference", True):
            self.moved.append((batch.policy_logps - batch.ref_logps).detach().float().cpu())
            self.logps.append(batch.policy_logps.detach().float().cpu())
        return batch

    def _evaluate(self) -> None:
        selection = self.trainer.selection
        self.moved, self.logps = [], []
        forward = partial(self._forward, costs=selection.run.costs, who="helper_", **selection.steps.context())
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


def _without_references(trainer: Any) -> Any:
    """The training set without the log-probabilities of the run's reference: a helper's is its own start."""
    known = set(trainer.train_dataset.column_names)
    return trainer.train_dataset.remove_columns([name for name in trainer_kind(trainer).references if name in known])


def _score_by_own_reference(helper: Any, inputs: dict[str, Any], ids: Tensor, **how: Any) -> Batch:
    """Rows of the run, which may hold the log-probabilities of its reference, under a helper and its own."""
    references = trainer_kind(helper).references
    return score_rows(helper, {name: value for name, value in inputs.items() if name not in references}, ids, **how)


def _prepared(stock: type) -> type:
    """The trainer class for data that is prepared already."""
    return type(
        f"Helper{stock.__name__}", (stock,), {"_prepare_dataset": lambda self, dataset, *args, **kwargs: dataset}
    )


def _start(trainer: Any, path: str | None) -> nn.Module:
    """The model that a helper run starts from."""
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
    A new model that computes what the policy computes now: with the weights of its adapter added to those beneath.

    Never a deep copy: TRL's fused head is a closure over the original model.

    Raises:
        `ValueError`: for a quantised model, whose weights cannot be copied into a plain one, and for an adapter that
            changes no weights.
    """
    base = base_model(trainer)
    if getattr(base, "is_loaded_in_4bit", False) or getattr(base, "is_loaded_in_8bit", False):
        raise ValueError("A quantised model cannot be copied for a helper run: give the scores as a dataset column.")
    for adapter in getattr(trainer.accelerator.unwrap_model(trainer.model), "peft_config", {}).values():
        if adapter.is_prompt_learning:
            kind = getattr(adapter.peft_type, "value", adapter.peft_type)
            raise ValueError(
                f"An adapter of the kind {kind} cannot be copied for a helper run: it changes no weights. Name "
                "another model (helper_model), or give the scores as a dataset column."
            )
    config = copy.deepcopy(base.config)
    ends = (base.get_input_embeddings(), base.get_output_embeddings())
    if getattr(config, "tie_word_embeddings", False) and any(isinstance(layer, ADAPTED) for layer in ends):
        # One end may have learned what the other has not.
        config.tie_word_embeddings = False
    model = type(base)(config).to(device=base.device, dtype=base.dtype)
    model.load_state_dict(_merged_state(base))
    model.generation_config = copy.deepcopy(base.generation_config)
    return model


def _merged_state(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a plain model that computes what `model`, with its active adapter inside, computes."""
    state = model.state_dict()
    done: list[str] = []
    for name, layer in model.named_modules():
        if not isinstance(layer, ADAPTED) or name.startswith(tuple(done)):
            continue
        done.append(f"{name}.")
        plain = _merged(layer).state_dict()
        state = {key: value for key, value in state.items() if not key.startswith(f"{name}.")}
        state |= {f"{name}.{key}": value for key, value in plain.items()}
    return state


def _merged(layer: Any) -> nn.Module:
    """A plain layer with what the active adapter has learned. The layer itself stays as it is, bit for bit."""
    own = copy.deepcopy(layer)
    if isinstance(own, AuxiliaryTrainingWrapper):
        if own.disable_adapters:
            return own.original_module
        return own.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
    if not own.disable_adapters:
        own.merge()
    return own.get_base_layer()
