"""The private and undocumented names of other libraries that this room uses, in one table.

A release that lacks one of them is refused by that name, before anything has been changed.
"""

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..core.sidecar import versions
from .kinds import KINDS, TrainerKind

ALL = tuple(KINDS)
ANYTHING = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
WITH_REFERENCE = ("dpo", "kto")


@dataclass(frozen=True)
class Internal:
    """
    A name of another library that is used although it promises nothing of it.

    Attributes:
        name (`str`):
            The name.
        owner (`str`):
            `"class"` for what a trainer's class has, `"instance"` for what its constructor sets, `"running"` for what
            is set when training begins, `"model"` for what is set on a model for others to read, or the module that
            holds it.
        parameters (`tuple[str, ...]`, *optional*):
            What a function is given, by these names or in this order; `None` for a value.
        kinds (`tuple[str, ...]`):
            The kinds of trainer of which it is used.
        optional (`bool`, *optional*, defaults to `False`):
            Whether a release may lack it.
    """

    name: str
    owner: str
    parameters: tuple[str, ...] | None = None
    kinds: tuple[str, ...] = ALL
    optional: bool = False


def _seams(*seams: tuple[str, tuple[str, ...]]) -> tuple[Internal, ...]:
    return tuple(Internal(name, "class", parameters) for name, parameters in seams)


def _values(*names: str, kinds: tuple[str, ...] = ALL) -> tuple[Internal, ...]:
    return tuple(Internal(name, "instance", kinds=kinds) for name in names)


INTERNALS: tuple[Internal, ...] = (
    # Overridden, and called on the class beneath.
    *_seams(
        ("train", ("resume_from_checkpoint",)),
        ("_inner_training_loop", ()),
        ("get_train_dataloader", ()),
        ("get_batch_samples", ("epoch_iterator", "num_batches", "device")),
        ("training_step", ("model", "inputs")),
        ("compute_loss", ("model", "inputs", "return_outputs", "num_items_in_batch")),
        ("log", ("logs", "start_time")),
        ("_remove_unused_columns", ("dataset", "description")),
        ("_set_signature_columns_if_needed", ()),
        ("_get_train_sampler", ("train_dataset",)),
        (
            "_init_training_state",
            ("max_steps", "num_update_steps_per_epoch", "num_train_epochs", "resume_from_checkpoint", "trial"),
        ),
        ("_load_optimizer_and_scheduler", ("checkpoint",)),
        ("_save_checkpoint", ("model", "trial")),
        ("_save_rng_state", ("output_dir",)),
        ("_clip_grad_norm", ("model",)),
    ),
    # Called.
    *_seams(("_get_output_dir", ("trial",)), ("_prepare_inputs", ("inputs",))),
    Internal(
        "_prepare_dataset",
        "class",
        ("dataset", "processing_class", "args", "dataset_name"),
        kinds=("dpo", "kto", "reward"),
    ),
    Internal(
        "_prepare_dataset",
        "class",
        ("dataset", "processing_class", "args", "packing", "formatting_func", "dataset_name"),
        kinds=("sft",),
    ),
    Internal("_precompute_ref_logps", "class", ("dataset", "name", "batch_size"), kinds=WITH_REFERENCE),
    # Read, and some of them set for a while.
    *_values(
        "callback_handler",
        "is_deepspeed_enabled",
        "is_fsdp_enabled",
        "model_accepts_loss_kwargs",
        "compute_loss_func",
        "label_smoother",
        "_signature_columns",
        "_train_batch_size",
    ),
    Internal("current_gradient_accumulation_steps", "running"),
    Internal("lr_scheduler", "instance"),
    *_values("_tokenizer", "_is_vision_dataset", kinds=("dpo", "sft", "kto")),
    *_values("ref_model", "beta", "precompute_ref_logps", kinds=WITH_REFERENCE),
    *_values(
        "loss_types",
        "loss_weights",
        "label_smoothing",
        "f_divergence_type",
        "f_alpha_divergence_coef",
        "ld_alpha",
        "use_weighting",
        kinds=("dpo",),
    ),
    *_values("_formatting_func", "_skip_prepare_dataset", kinds=("sft",)),
    *_values("loss_type", "desirable_weight", "undesirable_weight", "calculate_KL", kinds=("kto",)),
    # Set on the model, for torch to read.
    Internal("_ddp_params_and_buffers_to_ignore", "model"),
    # Set on a model by torch, where it is compiled in place.
    Internal("_compiled_call_impl", "model"),
    # Of modules that their documentation does not name.
    Internal("use_adapter", "trl.trainer.utils", ("model", "adapter_name")),
    Internal("add_fused_lm_head", "trl.trainer.utils", ("model", "outputs"), optional=True),
    Internal("unwrap_model_for_generation", "trl.models.utils", ("model", "accelerator")),
    Internal("BatchRebalanceSampler", "transformers.trainer_pt_utils"),
    Internal("BaseTunerLayer", "peft.tuners.tuners_utils"),
    Internal("AuxiliaryTrainingWrapper", "peft.utils"),
    Internal("_foreach_mul_", "torch"),
)


def check_internals(trainer: Any, kind: TrainerKind) -> None:
    """
    Checks that the installed releases have what this package uses of a trainer.

    Raises:
        `ImportError`: that names what is missing, or called otherwise, and the releases found.
    """
    for internal in INTERNALS:
        if kind.name in internal.kinds and (problem := find_problem(internal, trainer, kind.trainer)):
            found = ", ".join(f"{name} {release}" for name, release in versions().items())
            raise ImportError(
                f"{problem} Found {found}: the README's section 'Versions' says which ones this package was run with."
            )


def find_problem(internal: Internal, trainer: Any, cls: type) -> str | None:
    """What is wrong with a name on `trainer`, whose class in TRL is `cls`; `None` where it is as it is used."""
    if internal.owner in ("running", "model"):
        return None
    if internal.owner == "instance":
        return None if hasattr(trainer, internal.name) else _missing(internal.name, cls.__name__)
    if internal.owner == "class":
        holder: Any = cls
    else:
        try:
            holder = importlib.import_module(internal.owner)
        except ImportError:
            holder = None
    found = getattr(holder, internal.name, None)
    where = cls.__name__ if internal.owner == "class" else internal.owner
    if found is None:
        return None if internal.optional else _missing(internal.name, where)
    if internal.parameters is not None and (absent := missing_parameters(found, internal.parameters)):
        return f"`{where}.{internal.name}` takes no {absent}, which dsel_trl gives it: it takes {_parameters(found)}."
    return None


def missing_parameters(function: Callable[..., Any], names: tuple[str, ...]) -> list[str]:
    """Which of these names a function does not take; one that passes on whatever it is given takes all."""
    parameters = inspect.signature(function).parameters
    if {parameter.kind for parameter in parameters.values()} & ANYTHING:
        return []
    return [name for name in names if name not in parameters]


def _parameters(function: Callable[..., Any]) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


def _missing(name: str, owner: str) -> str:
    return f"dsel_trl uses `{name}` of `{owner}`, which is not there."
