"""The seams between a TRL trainer and the selection: the only file that knows the trainers' internals."""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset
from safetensors.torch import load_model, save_model
from torch import Tensor
from transformers.trainer_pt_utils import BatchRebalanceSampler
from trl import DPOTrainer, KTOTrainer, RewardTrainer, SFTTrainer
from trl.trainer.utils import add_fused_lm_head

from ..core.sidecar import read_sidecar
from ..sampling.batch_sampler import BatchPlanSampler
from ..signals.kto_batch import KTOBatch
from ..signals.tap import (
    ROW_LENGTHS,
    Batch,
    Forward,
    LossSettings,
    PairBatch,
    Reading,
    RewardBatch,
    SequenceBatch,
    label_log_probs,
)

if TYPE_CHECKING:
    from ..callback import SelectionCallback

    _Trainer = Any
else:
    _Trainer = object

EXAMPLE_ID = "example_id"
COLUMNS = "example_columns"
KINDS = {"dpo": DPOTrainer, "sft": SFTTrainer, "kto": KTOTrainer, "reward": RewardTrainer}
# Reference log-probabilities that a prepared dataset may hold: of a pair, and of KTO's responses.
REFERENCES = {"ref_chosen_logps", "ref_rejected_logps", "ref_logps", "ref_KL_logps"}
# What else of a collated batch is no input of a model.
NOT_FOR_THE_MODEL = {"completion_mask", "labels", "label", EXAMPLE_ID, ROW_LENGTHS}
CHECKPOINT = re.compile(r"^checkpoint-(\d+)$")


class IndexedRows(torch.utils.data.Dataset):
    """A map-style dataset whose rows carry their position as `example_id`."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.dataset[index], EXAMPLE_ID: index}

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        rows = self.dataset.__getitems__(indices)
        return [{**row, EXAMPLE_ID: index} for row, index in zip(rows, indices, strict=True)]


class PlannedBatches(BatchRebalanceSampler):
    """
    Planned batches of varying size, as the trainer takes them: it passes on only its own kind of batch sampler.

    That kind is aware of its rank, so nothing shards it again.
    """

    def __init__(self, sampler: BatchPlanSampler) -> None:
        self.sampler = sampler

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.sampler)

    def set_epoch(self, epoch: int) -> None:
        """The plan follows the run, not the loader's count of epochs."""


class ExampleCollator:
    """
    The trainer's collator, which also keeps the id of each example and the columns that methods read of a stream.

    Rows of a stream have no position: their id is a hash of their content, the same wherever they are met.
    """

    def __init__(self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]], columns: tuple[str, ...]) -> None:
        self.collator = collator
        self.columns = columns

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        ids = [row[EXAMPLE_ID] if EXAMPLE_ID in row else content_id(row) for row in rows]
        batch = collated(self.collator, rows)
        batch[EXAMPLE_ID] = torch.tensor(ids, dtype=torch.int64)
        for name in self.columns:
            values = [float("nan") if row.get(name) is None else float(row[name]) for row in rows]
            batch[f"{COLUMNS}.{name}"] = torch.tensor(values, dtype=torch.float32)
        return batch


def collated(collator: Callable[[list[dict[str, Any]]], dict[str, Any]], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A collated batch; where its rows were laid into one (padding-free), it says how long each of them is."""
    batch = collator(rows)
    if batch["input_ids"].shape[0] < len(rows):
        batch[ROW_LENGTHS] = torch.tensor([len(row["input_ids"]) for row in rows])
    return batch


class PairedAnew:
    """
    KTO's collator for batches that a selection puts together: their KL completions are each other's.

    KTO estimates its KL term on prompts with the completions of their neighbours. TRL pairs them beforehand, for the
    batches of the dataset's own order (and forbids any other); here the rows that are served together are paired in
    the same way, each prompt with the completion before it.
    """

    def __init__(self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> None:
        self.collator = collator

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        completions = [row["completion_ids"] for row in rows]
        before = completions[-1:] + completions[:-1]
        return self.collator([{**row, "KL_completion_ids": other} for row, other in zip(rows, before, strict=True)])


def collator_of(trainer: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """The collator of the batches that the trainer's selection serves."""
    # Where images are in the data, TRL's own collator pairs the rows of each batch.
    paired_before = trainer_kind(trainer) == "kto" and trainer.calculate_KL and not trainer._is_vision_dataset
    collator = trainer.data_collator
    return PairedAnew(collator) if paired_before and trainer.selection.regroups else collator


def content_id(row: dict[str, Any]) -> int:
    """63-bit hash of what a row holds."""
    content = json.dumps(row, sort_keys=True, default=str).encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") >> 1


class SelectionMixin(_Trainer):
    """
    Joins a TRL trainer with a [`SelectionCallback`]: before a trainer class, or set on an instance by the callback.

    Every seam is an ordinary method that calls `super()`; without a selection each of them is the trainer's own.
    """

    selection: "SelectionCallback | None" = None
    # Set by the trainers themselves.
    data_collator: Any
    _signature_columns: Any
    _train_batch_size: int

    def __reduce__(self) -> tuple[Any, ...]:
        # A class made on the spot cannot be found by name: rebuild it from the class it was made of.
        return _rebuild, (stock_class(type(self)),), self.__dict__.copy()

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        if self.selection is not None:
            if resume_from_checkpoint is True:
                resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
            self.selection.begin_run(resume_from_checkpoint or None)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        dataset = super()._remove_unused_columns(dataset, description=description)
        if self.selection is None or description != "Training":
            return dataset
        self.selection.served_rows = IndexedRows(dataset)
        return self.selection.served_rows

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self.selection is not None and self.selection.streaming:
            missing = [name for name in self.selection.columns if name not in self._signature_columns]
            self._signature_columns = [*self._signature_columns, *missing]

    def get_train_dataloader(self) -> Any:
        if self.selection is None:
            return super().get_train_dataloader()
        collator, batch_size = self.data_collator, self._train_batch_size
        columns = self.selection.columns if self.selection.streaming else ()
        self.data_collator = ExampleCollator(collator_of(self), columns)
        self._train_batch_size = batch_size * self.selection.candidates
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator, self._train_batch_size = collator, batch_size

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        rows = train_dataset.dataset if isinstance(train_dataset, IndexedRows) else train_dataset
        sampler = None if self.selection is None or rows is None else self.selection.make_sampler()
        if sampler is None:
            return super()._get_train_sampler(rows)
        return PlannedBatches(sampler) if isinstance(sampler, BatchPlanSampler) else sampler

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> tuple[list, Any]:
        if self.selection is not None:
            if self.selection.candidates > 1:
                epoch_iterator = map(self.selection.pick, epoch_iterator)
            batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
            self.selection.steps.begin(len(batches))
            return batches, count
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(model, inputs, *args, **kwargs)
        if self.selection is not None and self.accelerator.sync_gradients:
            scale = self.selection.steps.accumulated_scale()
            if scale != 1.0:
                torch._foreach_mul_([p.grad for p in model.parameters() if p.grad is not None], scale)
        return loss

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        ids = inputs.pop(EXAMPLE_ID, None)
        columns = {key: inputs.pop(key) for key in [k for k in inputs if k.startswith(f"{COLUMNS}.")]}
        layout = {ROW_LENGTHS: inputs.pop(ROW_LENGTHS)} if ROW_LENGTHS in inputs else {}
        if self.selection is None or ids is None or not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with self.selection.steps.listen(ids, {**inputs, **layout}, columns) as listening:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        extra = self.selection.steps.after_forward(listening)
        if extra is None:
            return result
        # A loss that is normalised over the accumulation window is not divided by the steps afterwards.
        scale = 1.0 if num_items_in_batch is None or not self.model_accepts_loss_kwargs else num_batches_share(self)
        return (result[0] + extra * scale, result[1]) if return_outputs else result + extra * scale

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.selection is not None and self.model.training and "loss" in logs:
            logs.update(self.selection.metrics())
        super().log(logs, start_time)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.selection is not None and self.args.should_save:
            folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
            # `trainer_state.json` is the last file the trainer writes: without it a checkpoint counts as incomplete.
            (folder / "trainer_state.json").unlink(missing_ok=True)
            self.selection.save(folder)
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self.selection is not None:
            # The first process completes the checkpoint next: all others must have written their part.
            self.accelerator.wait_for_everyone()


def num_batches_share(trainer: Any) -> float:
    return 1.0 / trainer.current_gradient_accumulation_steps


def _rebuild(cls: type) -> Any:
    selective: Any = selective_class(cls)
    return selective.__new__(selective)


_CLASSES: dict[type, type] = {}


def selective_class(cls: type) -> type:
    """The class of trainers of type `cls` with the seams in place."""
    if issubclass(cls, SelectionMixin):
        return cls
    if cls not in _CLASSES:
        _CLASSES[cls] = type("Selective" + cls.__name__, (SelectionMixin, cls), {"__module__": __name__})
    return _CLASSES[cls]


def stock_class(cls: type) -> type:
    """The class that `selective_class` was given."""
    return next((stock for stock, selective in _CLASSES.items() if selective is cls), cls)


def trainer_kind(trainer: Any) -> str:
    """One of `KINDS`; `TypeError` for trainers whose signals are not known."""
    for kind, cls in KINDS.items():
        if isinstance(trainer, cls):
            return kind
    known = ", ".join(cls.__name__ for cls in KINDS.values())
    raise TypeError(f"{type(trainer).__name__} is not supported: use one of {known}.")


def loss_settings(trainer: Any) -> LossSettings:
    """What decides an example's loss, as the trainer holds it now (`beta` may change while it trains)."""
    kind = trainer_kind(trainer)
    if kind == "sft":
        return LossSettings()
    if kind == "reward":
        return LossSettings(center_rewards=trainer.args.center_rewards_coefficient or 0.0)
    if kind == "kto":
        return LossSettings(
            beta=trainer.beta,
            loss_types=(trainer.loss_type,),
            desirable_weight=trainer.desirable_weight,
            undesirable_weight=trainer.undesirable_weight,
        )
    return LossSettings(
        beta=trainer.beta,
        loss_types=tuple(trainer.loss_types),
        loss_weights=tuple(trainer.loss_weights),
        label_smoothing=trainer.label_smoothing,
        discopop_tau=trainer.args.discopop_tau,
        f_divergence=trainer.f_divergence_type,
        f_alpha=trainer.f_alpha_divergence_coef,
        ld_alpha=trainer.ld_alpha,
        use_weighting=trainer.use_weighting,
    )


BATCHES = {"dpo": PairBatch, "sft": SequenceBatch, "kto": KTOBatch, "reward": RewardBatch}


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
    settings, kind = loss_settings(trainer), trainer_kind(trainer)
    if kind == "kto" and trainer.calculate_KL:
        settings.kl = kl_term(trainer, inputs, reading) if kl is None else kl
    cls = SequenceBatch if is_sequences(trainer, inputs) else BATCHES[kind]
    return cls(ids, inputs, reading.policy, reading.reference, settings=settings, **context)


def kl_term(trainer: Any, inputs: dict[str, Any], reading: Reading) -> Tensor:
    """KTO's KL term of a training step, the mean over all ranks, as the trainer itself is about to compute it."""
    width = inputs["KL_completion_mask"].shape[1] - 1
    # Both models run the KL rows before the examples: the policy first of all, the reference after the policy.
    policy, *rest = (forward.log_probs[:, -width:].sum(dim=1) for forward in reading.without_gradient[:2])
    reference = inputs["ref_KL_logps"] if trainer.precompute_ref_logps else rest[0]
    return trainer.accelerator.gather_for_metrics((policy - reference).mean()).mean().clamp(min=0)


def is_sequences(trainer: Any, inputs: dict[str, Any]) -> bool:
    """Whether a batch holds single sequences: always for SFT, and in passes over one side of the pairs."""
    return trainer_kind(trainer) == "sft" or "labels" in inputs


def labels_of(trainer: Any, inputs: dict[str, Any]) -> Tensor:
    """Labels of a collated batch, -100 where there is no loss."""
    if is_sequences(trainer, inputs):
        return inputs["labels"]
    if trainer_kind(trainer) == "reward":
        return inputs["input_ids"]  # no token has a loss of its own, but none is hidden either
    return inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)


def forwards_without_gradient(trainer: Any) -> int:
    """How many forwards without gradient belong to a training step: those of the reference, and of KTO's KL term."""
    kind = trainer_kind(trainer)
    reference = int(kind in ("dpo", "kto") and not trainer.precompute_ref_logps)
    return 2 * reference + 1 if kind == "kto" and trainer.calculate_KL else reference


def request_outputs(trainer: Any, names: tuple[str, ...]) -> Callable[[], None]:
    """Makes the fused head return more per-token fields; gives back what undoes it."""
    if not names:
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


def base_model(trainer: Any) -> Any:
    """The model that carries the fused head: under PEFT the one inside the adapter."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def collate_rows(trainer: Any, ids: np.ndarray) -> dict[str, Any]:
    """The examples of `ids` as the trainer's collator gives them, on the training device."""
    if trainer.selection.rows is None:
        trainer.selection.rows = trainer._remove_unused_columns(trainer.train_dataset, description="Scoring")
    rows = trainer.selection.rows.__getitems__(np.asarray(ids).tolist())
    return trainer._prepare_inputs(collated(collator_of(trainer), rows))


def rebuilt(trainer: Any, build: Callable[[], Any], file: Path, resumed: bool) -> Any:
    """
    The dataset that `build` gives, prepared by the trainer; `None` where it gives none.

    It is written to `file` by the first process and read back by all, so that every rank trains on the same rows and a
    resumed run finds what it was trained on.
    """
    if not (resumed and file.is_file()):
        dataset = build()
        if dataset is None:
            return None
        if trainer.accelerator.is_main_process:
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary = file.with_name(file.name + ".tmp")
            dataset.to_parquet(str(temporary))
            os.replace(temporary, file)
        trainer.accelerator.wait_for_everyone()
    return prepared(trainer, Dataset.from_parquet(str(file), keep_in_memory=True), "train")


def prepared(trainer: Any, dataset: Any, name: str) -> Any:
    """A dataset as the trainer prepares its own: tokenized, with reference log-probabilities where it keeps them."""
    if "prompt_ids" not in dataset.column_names and "input_ids" not in dataset.column_names:
        arguments = [dataset, trainer.processing_class, trainer.args]
        if trainer_kind(trainer) == "sft":
            arguments += [trainer.args.packing, trainer._formatting_func]
        dataset = trainer._prepare_dataset(*arguments, name)
    wanted = getattr(trainer.args, "precompute_ref_log_probs", False)
    if wanted and not REFERENCES & set(dataset.column_names):
        batch_size = trainer.args.precompute_ref_batch_size or trainer.args.per_device_train_batch_size
        dataset = trainer._precompute_ref_logps(dataset, name, batch_size)
    return dataset


def replace_dataset(trainer: Any, dataset: Any) -> None:
    """
    Makes the trainer train on `dataset`, also where its loader is made already.

    Raises:
        `ValueError`: if loader workers that live on hold a copy of the rows.
    """
    if trainer.args.dataloader_persistent_workers and trainer.selection.served_rows is not None:
        raise ValueError("dataloader_persistent_workers=True keeps the rows of the first epoch: set it to False.")
    trainer.train_dataset = dataset
    trainer.selection.rows = None
    if trainer.selection.served_rows is not None:
        trainer.selection.served_rows.dataset = trainer._remove_unused_columns(dataset, description="Rebuilt")


def score_rows(
    trainer: Any,
    inputs: dict[str, Any],
    ids: Tensor,
    *,
    reference: bool = True,
    kl: float | Tensor = 0.0,
    **context: Any,
) -> Batch:
    """
    Runs a collated batch through the policy (and the reference) without gradient, in evaluation mode.

    The model is called, not `compute_loss`, so that the trainer's own metrics stay untouched. `kl` is what KTO's
    losses take for the KL term, which belongs to a trained batch: rows that are only looked at have none.
    """
    if (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled) and trainer.optimizer is None:
        raise ValueError(
            "Under FSDP and DeepSpeed the model is not in place before training starts, so no pass over the data can "
            "be made then. Score the data in a run without them and give the scores as dataset columns."
        )
    labels = labels_of(trainer, inputs)
    own = NOT_FOR_THE_MODEL | REFERENCES
    kwargs = {k: v for k, v in inputs.items() if k not in own and not k.startswith((f"{COLUMNS}.", "KL_"))}
    model, training = trainer.model, trainer.model.training
    model.eval()
    try:
        with torch.no_grad(), trainer.accelerator.autocast():
            if trainer_kind(trainer) == "reward":
                rewards = model(**{k: v for k, v in kwargs.items() if k != "margin"}, use_cache=False).logits
                return make_batch(trainer, ids.to(labels.device), inputs, Reading(policy=Forward(rewards)), **context)
            output = model(**{**kwargs, "use_cache": False}, labels=labels, fused_lm_head=True)
            policy = Forward(
                output.log_probs if output.log_probs is not None else label_log_probs(output.logits, labels),
                output.entropy,
                output.is_top1,
                output.log_sum_sq_probs,
            )
            reading = Reading(policy=policy)
            if reference and not is_sequences(trainer, inputs) and not REFERENCES & set(inputs):
                reading.without_gradient.append(Forward(_reference_token_logps(trainer, kwargs, labels)))
    finally:
        model.train(training)
    return make_batch(trainer, ids.to(labels.device), inputs, reading, kl=kl, **context)


def _reference_token_logps(trainer: Any, kwargs: dict[str, Any], labels: Tensor) -> Tensor:
    from trl.trainer.utils import use_adapter

    if trainer.ref_model is not None:
        return trainer.ref_model(**{**kwargs, "use_cache": False}, labels=labels, fused_lm_head=True).log_probs
    model = trainer.accelerator.unwrap_model(trainer.model)
    if not hasattr(model, "peft_config"):
        raise ValueError(
            "The reference model is gone (`precompute_ref_log_probs=True` without PEFT), so extra passes cannot "
            "measure margins of examples whose reference log-probabilities are not in the dataset."
        )
    with use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None):
        return trainer.model(**{**kwargs, "use_cache": False}, labels=labels, fused_lm_head=True).log_probs


def refer(trainer: Any, file: Path, restore: bool) -> None:
    """
    Makes the separate reference model a copy of the policy as it is now and keeps it in `file`; with `restore`, of
    what `file` holds.
    """
    reference = trainer.accelerator.unwrap_model(trainer.ref_model)
    if not restore:
        policy = trainer.accelerator.unwrap_model(trainer.model)
        reference.load_state_dict(policy.state_dict())
        if trainer.accelerator.is_main_process:
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary = file.with_name(file.name + ".tmp")
            save_model(reference, str(temporary))
            os.replace(temporary, file)
        trainer.accelerator.wait_for_everyone()
        return
    if not file.is_file():
        raise ValueError(f"{file} is missing: it held the reference model that the checkpoint was trained against.")
    load_model(reference, str(file), device=str(next(reference.parameters()).device))


def last_complete_checkpoint(output_dir: str) -> str:
    """
    The newest checkpoint that was written to its end: one in the making when its run was killed does not count.

    Raises:
        `ValueError`: if there is none.
    """
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if CHECKPOINT.match(path.name)]
    problems = []
    for folder in sorted(folders, key=lambda path: int(path.name.split("-")[1]), reverse=True):
        try:
            check_finished(folder)
        except ValueError as error:
            problems.append(str(error))
            continue
        return str(folder)
    raise ValueError(f"No complete checkpoint found in output directory ({output_dir}). {' '.join(problems)}".strip())


def check_finished(folder: str | os.PathLike) -> None:
    """Raises `ValueError` if the last file of a checkpoint, by which it is complete, is missing or cut short."""
    state = Path(folder) / "trainer_state.json"
    try:
        json.loads(state.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is incomplete: {state.name} cannot be read ({error}).") from error


def check_checkpoint(folder: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The selection state of a complete checkpoint; `ValueError` says what is missing or broken."""
    check_finished(folder)
    return read_sidecar(Path(folder) / "selection")


def is_map_style(trainer: Any) -> bool:
    return isinstance(trainer.train_dataset, Dataset)


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
