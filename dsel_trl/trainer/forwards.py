"""Forwards through the trainer's models, and what is read of them."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

from ..core.costs import Costs
from ..core.evaluation import evaluation_mode
from ..data.files import replacing
from ..signals.batch import Batch, Forward
from ..signals.logits import read_logits
from ..signals.tap import Reading, label_log_probs
from .kinds import COLUMNS, NOT_FOR_THE_MODEL, batch_type, labels_of, trainer_kind


def make_batch(
    trainer: Any,
    ids: Tensor,
    inputs: dict[str, Any],
    reading: Reading,
    *,
    kl: float | Tensor | None = None,
    **context: Any,
) -> Batch:
    """The batch of a reading, in the layout of this trainer; `kl` where KTO's KL term is not to be read as well."""
    assert reading.policy is not None
    kind = trainer_kind(trainer)
    settings = kind.settings(trainer)
    if kind.kl(trainer):
        settings.kl = kind.kl_term(trainer, inputs, reading) if kl is None else kl
    cls = batch_type(kind, inputs)
    return cls(ids, inputs, reading.policy, reading.reference, settings=settings, **context)


def fused_head() -> Callable[..., None] | None:
    """What gives a model TRL's fused head; `None` in a TRL without one, whose models return logits."""
    try:
        from trl.trainer.utils import add_fused_lm_head
    except ImportError:
        return None
    return add_fused_lm_head


def own_outputs(trainer: Any) -> tuple[str, ...]:
    """Per-token fields that the trainer's own loss needs beside the log-probabilities."""
    return ("log_sum_sq_probs",) if trainer_kind(trainer).settings(trainer).use_weighting else ()


def request_outputs(trainer: Any, names: tuple[str, ...]) -> Callable[[], None]:
    """Makes the fused head return more per-token fields; gives back what undoes it."""
    add_fused_lm_head = fused_head()
    if not names or add_fused_lm_head is None:
        return lambda: None
    model = base_model(trainer)
    before = model.__dict__.get("forward")
    wanted = ("log_probs", "entropy", "mean_logits", "is_top1", *names)
    add_fused_lm_head(model, outputs=wanted)

    def undo() -> None:
        if before is None:
            del model.forward
        else:
            model.forward = before

    return undo


def read_tokens(model: Any, kwargs: dict[str, Any], labels: Tensor, outputs: tuple[str, ...] = ()) -> Forward:
    """Per-token fields of a forward beside the training."""
    kwargs = {**kwargs, "use_cache": False}
    if fused_head() is None:
        return read_logits(model(**kwargs).logits, labels, outputs)
    output = model(**kwargs, labels=labels, fused_lm_head=True)
    if output.log_probs is None:
        return read_logits(output.logits, labels, outputs)
    return Forward(output.log_probs, output.entropy, output.is_top1, output.log_sum_sq_probs)


def base_model(trainer: Any) -> Any:
    """The model that carries the fused head: under PEFT the one inside the adapter."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def heard_model(trainer: Any) -> Any:
    """The model whose hooks every forward of the policy passes: up to PEFT 0.20 an adapter calls past its model's."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    return model.base_model if hasattr(model, "get_base_model") else model


def model_around(trainer: Any) -> Any:
    """What stands around [`heard_model`]: the adapter; `None` without one."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    return model if hasattr(model, "get_base_model") else None


def ignore_bias_buffers(trainer: Any) -> None:
    """Keeps boolean buffers out of what distributed training synchronises, as TRL's own scripts do."""
    trainer.model._ddp_params_and_buffers_to_ignore = [
        name for name, buffer in trainer.model.named_buffers() if str(buffer.dtype) == "torch.bool"
    ]


def placed_model(trainer: Any) -> Any:
    """
    The model as passes call it: where training put it, or under DeepSpeed the engine, which gathers its parameters.

    Raises:
        `ValueError`: while FSDP or DeepSpeed has yet to put it in place, which they do when training begins.
    """
    if (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled) and trainer.optimizer is None:
        raise ValueError(
            "Under FSDP and DeepSpeed the model is not in place before training starts, so no pass over the data can "
            "be made then. Score the data in a run without them and give the scores as dataset columns."
        )
    return trainer.model_wrapped if trainer.is_deepspeed_enabled else trainer.model


def score_rows(
    trainer: Any,
    inputs: dict[str, Any],
    ids: Tensor,
    *,
    reference: bool = True,
    policy: Forward | None = None,
    kl: float | Tensor = 0.0,
    costs: Costs | None = None,
    who: str = "",
    gradient: bool = False,
    **context: Any,
) -> Batch:
    """
    Runs a collated batch through the policy (and the reference) in evaluation mode, without gradient.

    With `gradient` the policy's log-probabilities carry gradient, and so does the `loss` of the batch; the model then
    stays in the mode that it is in ([`evaluating`] holds one until the backward pass is done).

    With `policy` the outputs of another model stand in the policy's place, which is not run then. What is run is
    counted in `costs`, under names that begin with `who` (`"helper_"`).

    The model is called, not `compute_loss`, so that the trainer's own metrics stay untouched. `kl` is what KTO's
    losses take for the KL term, which belongs to a trained batch: rows that are only looked at have none.
    """
    model, kind = placed_model(trainer), trainer_kind(trainer)
    labels = labels_of(kind, inputs)
    own = NOT_FOR_THE_MODEL | set(kind.references)
    kwargs = {k: v for k, v in inputs.items() if k not in own and not k.startswith((f"{COLUMNS}.", "KL_"))}
    costs = Costs() if costs is None else costs
    size = ids.numel(), token_count(inputs)
    mode = contextlib.nullcontext() if gradient else evaluation_mode(model)
    with mode, torch.set_grad_enabled(gradient), trainer.accelerator.autocast():
        if kind.heads:
            rewards = model(**{k: v for k, v in kwargs.items() if k != "margin"}, use_cache=False).logits
            costs.ran(f"{who}forwards", *size)
            return make_batch(trainer, ids.to(labels.device), inputs, Reading(policy=Forward(rewards)), **context)
        if policy is None:
            selection = getattr(trainer, "selection", None)
            outputs = own_outputs(trainer) if selection is None else selection.tap.outputs
            policy = (_read_with_gradient if gradient else read_tokens)(model, kwargs, labels, outputs)
            costs.ran(f"{who}forwards", *size)
        reading = Reading(policy=policy)
        if reference and "labels" not in inputs and not set(kind.references) & set(inputs):
            reading.without_gradient.append(Forward(_reference_token_logps(trainer, kwargs, labels)))
            costs.ran(f"{who}reference_forwards", *size)
    return make_batch(trainer, ids.to(labels.device), inputs, reading, kl=kl, **context)


def _checkpoints(module: Any) -> bool:
    """Whether a layer runs its forward again on the way back; the reentrant way does not serve `autograd.grad`."""
    function = getattr(module, "_gradient_checkpointing_func", None)
    again = bool(getattr(module, "gradient_checkpointing", False)) and function is not None
    return again and not getattr(function, "keywords", {}).get("use_reentrant", True)


@contextlib.contextmanager
def evaluating(trainer: Any) -> Iterator[None]:
    """
    Evaluation mode for forwards that are differentiated: held until the `with` block ends.

    Layers that keep no activations while they train, keep none here: `gradient_checkpointing` acts in training mode
    only, so that these layers alone are left in it, where nothing is dropped at random in it.
    """
    model = placed_model(trainer)
    modes = {module: module.training for module in model.modules()}
    config = getattr(trainer.accelerator.unwrap_model(trainer.model), "config", None)
    dropped = [value for key, value in (config.to_dict() if config is not None else {}).items() if "drop" in key]
    model.eval()
    try:
        if not any(isinstance(value, float) and value > 0 for value in dropped):
            for module in modes:
                module.training = _checkpoints(module)
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _read_with_gradient(model: Any, kwargs: dict[str, Any], labels: Tensor, outputs: tuple[str, ...]) -> Forward:
    """Log-probabilities that carry gradient; what else is read of the forward is numbers, as the losses take it."""
    if fused_head() is None:
        return Forward(label_log_probs(model(**kwargs, use_cache=False).logits, labels))
    read = read_tokens(model, kwargs, labels, outputs)
    beside = (read.entropy, read.is_top1, read.log_sum_sq_probs)
    return Forward(read.log_probs, *(None if values is None else values.detach() for values in beside))


def token_count(inputs: dict[str, Any]) -> int:
    """Tokens of a collated batch without its padding."""
    mask = inputs.get("attention_mask")
    return int(inputs["input_ids"].numel() if mask is None else mask.sum())


def _reference_token_logps(trainer: Any, kwargs: dict[str, Any], labels: Tensor) -> Tensor:
    from trl.trainer.utils import use_adapter

    if trainer.ref_model is not None:
        with torch.no_grad():
            return read_tokens(trainer.ref_model, kwargs, labels).log_probs
    model = trainer.accelerator.unwrap_model(trainer.model)
    if not hasattr(model, "peft_config"):
        raise ValueError(
            "The reference model is gone (`precompute_ref_log_probs=True` without PEFT), so extra passes cannot "
            "measure margins of examples whose reference log-probabilities are not in the dataset."
        )
    with torch.no_grad(), use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None):
        return read_tokens(placed_model(trainer), kwargs, labels).log_probs


def _keep(trainer: Any, model: Any, file: Path, options: StateDictOptions) -> None:
    """Writes a model's parameters; where it is sharded, all processes put them together and the first one has them."""
    state: dict[str, Any] = get_model_state_dict(model, options=options)
    if trainer.accelerator.is_main_process:
        with replacing(file) as temporary:
            # The file takes no two names of one tensor, as tied weights have them.
            save_file({name: value.clone() for name, value in state.items()}, str(temporary))
    trainer.accelerator.wait_for_everyone()


def refer(trainer: Any, file: Path, restore: bool) -> None:
    """
    Makes the separate reference model a copy of the policy as it is now and keeps it in `file`; with `restore`, of
    what `file` holds.
    """
    reference = trainer.accelerator.unwrap_model(trainer.ref_model)
    if not restore:
        policy = trainer.accelerator.unwrap_model(trainer.model)
        reference.load_state_dict(policy.state_dict())
        _keep(trainer, reference, file, StateDictOptions(full_state_dict=True, cpu_offload=True))
        return
    if not file.is_file():
        raise ValueError(f"{file} is missing: it held the reference model that the checkpoint was trained against.")
    saved: dict[str, Any] = load_file(str(file))
    set_model_state_dict(reference, saved, options=StateDictOptions(full_state_dict=True))


def restart(trainer: Any, file: Path, restore: bool) -> None:
    """
    Keeps the policy's trained parameters in `file`; with `restore`, gives it back those of `file`, and empties the
    optimizer's state.
    """
    if trainer.is_deepspeed_enabled:
        raise ValueError(
            "The policy cannot start anew under DeepSpeed, which keeps weights of its own: use FSDP or DDP."
        )
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, strict=False)
    if not restore:
        _keep(trainer, trainer.model, file, options)
        return
    if not file.is_file():
        raise ValueError(f"{file} is missing: it held the weights that the policy began with.")
    saved: dict[str, Any] = load_file(str(file))
    set_model_state_dict(trainer.model, saved, options=options)
    trainer.optimizer.state.clear()


@contextlib.contextmanager
def attributes(trainer: Any, values: dict[str, float]) -> Iterator[None]:
    """Holds attributes of the trainer at other values for the `with` block."""
    before = {name: getattr(trainer, name) for name in values}
    try:
        for name, value in values.items():
            setattr(trainer, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(trainer, name, value)
