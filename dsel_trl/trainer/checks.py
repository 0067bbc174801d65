"""What must hold before a run starts: every slip is an error that names the culprit and what would be right."""

from typing import Any

import numpy as np

from ..core.composition import Composition
from ..data.columns import column_names, is_list_column, refuse_truth
from ..functional.dpo_losses import COUPLED_LOSSES
from .forwards import fused_head
from .kinds import TrainerKind
from .rows import TrainingRows


def drops_last(args: Any, methods: Composition) -> bool:
    """Whether the loader leaves out a last batch that is not full; batches that a method forms are served as it is."""
    return bool(args.dataloader_drop_last) and not methods.using("batch")


def check_run(trainer: Any, kind: TrainerKind, methods: Composition, training: TrainingRows | None) -> None:
    """
    Checks that a trainer, its dataset and the methods go together.

    Args:
        trainer:
            The TRL trainer.
        kind ([`~dsel_trl.trainer.kinds.TrainerKind`]):
            Its kind.
        methods ([`~dsel_trl.core.composition.Composition`]):
            The methods.
        training ([`~dsel_trl.trainer.rows.TrainingRows`], *optional*):
            The rows it trains on; `None` for a stream.

    Raises:
        `ValueError`: naming the culprit and what would be right.
    """
    args, dataset = trainer.args, trainer.train_dataset
    examples = trainer._train_batch_size * args.world_size * methods.candidates
    if fused_head() is None:
        check_without_fused_head(args, kind, methods)
    for method in methods.methods:
        if kind.name not in method.trainers:
            raise ValueError(f"{method.name!r} works with {list(method.trainers)}, not with {type(trainer).__name__}.")
    weighing = methods.using("weigh", "score", "adjust", "extra_loss", "pick", "after_backward")
    if weighing and (coupled := sorted(COUPLED_LOSSES & set(kind.settings(trainer).loss_types))):
        raise ValueError(
            f"loss_type {coupled} sorts the batch, so a pair has no loss or gradient of its own and "
            f"{[m.name for m in weighing]} cannot score or weigh it. Use another loss_type, such as 'sigmoid'."
        )
    averaged = [method.name for method in methods.using("weigh") if method.normalize == "mean1"]
    if averaged and args.gradient_accumulation_steps > 1 and getattr(trainer, "is_deepspeed_enabled", False):
        raise ValueError(
            f"{averaged} average their weights over the optimizer step, which DeepSpeed takes before the mean over "
            f"gradient_accumulation_steps={args.gradient_accumulation_steps} micro-batches is known. Set "
            "gradient_accumulation_steps=1, or normalize='none' where the method has it."
        )
    check_gradients(trainer, kind, methods)
    if getattr(args, "packing", False):
        for method in methods.methods:
            if not method.packed_rows:
                raise ValueError(
                    f"{method.name!r} needs single examples, but packing=True puts several into one row. Set "
                    "packing=False (padding_free=True is fine)."
                )
    if training is None:
        planning = methods.using("select", "order", "plan", "pick", "batch", "rebuild")
        if planning:
            raise ValueError(
                f"{[m.name for m in planning]} plan ahead, which a streaming dataset does not allow. Load the "
                "dataset without streaming, or use a method that only weighs."
            )
    else:
        if not len(dataset):
            raise ValueError("train_dataset is empty: there is nothing to select from.")
        if len(dataset) < examples and drops_last(args, methods):
            raise ValueError(
                f"train_dataset has {len(dataset)} examples, fewer than one batch of {examples} "
                f"({trainer._train_batch_size} x {args.world_size} processes x {methods.candidates} candidates), and "
                "dataloader_drop_last=True drops it: an epoch has no step. Set it to False, or use a smaller batch."
            )
    # What a user has not set is no wish: KTO's own default is "sequential".
    usual = type(args).train_sampling_strategy
    if methods.plans and args.train_sampling_strategy not in ("random", usual):
        planning = methods.using("select", "order", "plan", "batch")
        raise ValueError(
            f"train_sampling_strategy={args.train_sampling_strategy!r} orders the examples, and so do "
            f"{[m.name for m in planning]}: leave train_sampling_strategy at {usual!r}."
        )
    if kind.kl(trainer) and not kind.reference(trainer) and methods.regroups:
        grouping = methods.using("select", "order", "plan", "batch", "pick")
        raise ValueError(
            f"precompute_ref_log_probs=True holds the reference of KTO's KL term for the batches of the dataset's own "
            f"order, and {[m.name for m in grouping]} serve others. Set precompute_ref_log_probs=False, or "
            "loss_type='apo_zero_unpaired', which has no KL term."
        )
    present = column_names(dataset)
    for method in methods.methods:
        for name in method.columns:
            refuse_truth(name)
            if name not in present:
                raise ValueError(
                    f"{method.name!r} reads the column {name!r}, which the dataset does not have. Its columns are "
                    f"{sorted(present)}."
                )
            if training is not None and name in method.list_columns and is_list_column(training.rows.dataset, name):
                continue
            if training is not None and np.isnan(training.rows.column(name)).all():
                raise ValueError(f"Column {name!r}, read by {method.name!r}, has no value at all: every row is NaN.")


def check_gradients(trainer: Any, kind: TrainerKind, methods: Composition) -> None:
    """Raises `ValueError` where methods ask for the examples' gradients and these cannot be had."""
    reading, args = [method.name for method in methods.using("after_backward")], trainer.args
    if not reading:
        return
    besides = [m.name for m in methods.methods if "extra_loss" in m.hooks or m.own_loss]
    model = trainer.model
    compiled = args.torch_compile or hasattr(model, "_orig_mod") or model._compiled_call_impl is not None
    token_term = kind.name == "dpo" and "sft" in kind.settings(trainer).loss_types
    problems = (
        (compiled, "a compiled model hides its layers. Set torch_compile=False"),
        (trainer.is_deepspeed_enabled, "DeepSpeed takes gradients away as they come. Use DDP or FSDP2"),
        (args.n_gpu > 1, f"{args.n_gpu} GPUs in one process copy the layers. Start one process each"),
        (besides, f"{besides} train on another loss, or on a further one. Use them in runs of their own"),
        (token_term, "loss_type 'sft' is a mean over the tokens of a batch, not of a pair. Leave it out"),
        (_routes(trainer), "a mixture of experts couples the rows of a batch. Set router_aux_loss_coef=0"),
        (trainer.compute_loss_func, "compute_loss_func puts another loss in its place. Leave it out"),
        (trainer.label_smoother, "label_smoothing_factor puts another loss in its place. Set it to 0"),
    )
    for applies, problem in problems:
        if applies:
            raise ValueError(f"{reading} need the gradient of each example's own loss, but {problem}.")


def _routes(trainer: Any) -> bool:
    """Whether the loss has a term of a mixture of experts, as TRL decides it."""
    config = trainer.model.config.get_text_config()
    own = getattr(trainer.args, "router_aux_loss_coef", None)
    share = getattr(config, "router_aux_loss_coef", 0.0) if own is None else own
    return hasattr(config, "output_router_logits") and share != 0


def check_without_fused_head(args: Any, kind: TrainerKind, methods: Composition) -> None:
    """Raises `ValueError` for what needs the head that TRL has from 1.15 on."""
    if getattr(args, "use_liger_kernel", False) and not kind.heads:
        raise ValueError(
            "use_liger_kernel=True hides each token's log-probability in this TRL, so no example can be measured or "
            "weighed. Set use_liger_kernel=False, or use TRL 1.15 or newer, whose own head saves the same memory."
        )
    measuring = [method.name for method in methods.methods if method.reads_batches]
    if args.torch_compile and kind.inner_loss and measuring:
        raise ValueError(
            f"{measuring} read the loss that this TRL lets the model compute, which torch_compile=True hides. Set "
            "torch_compile=False, or use TRL 1.15 or newer."
        )
