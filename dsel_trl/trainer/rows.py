"""Rows as the trainer prepares, collates and serves them."""

import hashlib
import json
import numbers
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers.trainer_pt_utils import BatchRebalanceSampler

from ..core.composition import Composition
from ..core.method import Method
from ..core.run import Run
from ..data.files import replacing
from ..data.loading import check_rows, load_splits, take_split
from ..data.rows import Layout, Rows
from ..sampling.batch_sampler import BatchPlanSampler
from ..sampling.plan_sampler import PlanSampler
from ..signals.batch import ROW_LENGTHS
from .kinds import COLUMNS, EXAMPLE_ID, trainer_kind
from .kto import Collator
from .matching import in_order, matched, per_row


class IndexedRows(torch.utils.data.Dataset):
    """A map-style dataset that gives each row with its position: `(id, row)`."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        # What plans the loader that is made of them; `None` = the trainer's own sampler.
        self.sampler: PlanSampler | BatchPlanSampler | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, dict[str, Any]]:
        return index, self.dataset[index]

    def __getitems__(self, indices: list[int]) -> list[tuple[int, dict[str, Any]]]:
        return list(zip(indices, self.dataset.__getitems__(indices), strict=True))


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
    The trainer's collator, beside which the id of each example is kept; the collator itself sees the rows alone. What
    it keeps lies as the batch's rows do, with which it may be shared among processes.

    Rows of a stream have no position: their id is a hash of their content, the same wherever they are met. Rows that
    come without a position from a loader of the user's own have no id.

    Args:
        collator (`Callable`):
            The trainer's collator.
        layout ([`~dsel_trl.data.rows.Layout`]):
            Where rows hold their tokens.
        columns (`tuple[str, ...]`, *optional*):
            Columns that methods read of a stream; `None` where the dataset is no stream.
    """

    def __init__(self, collator: Collator, layout: Layout, columns: tuple[str, ...] | None = None) -> None:
        self.collator, self.layout, self.columns = collator, layout, columns

    def __call__(self, items: list[Any]) -> dict[str, Any]:
        numbered = all(isinstance(item, tuple) for item in items)
        rows = [row for _, row in items] if numbered else items
        if numbered:
            ids = [number for number, _ in items]
        elif self.columns is not None:
            # Before the collator has them: those for images change their rows.
            ids = [content_id(row) for row in rows]
        else:
            ids = None
        batch, positions = collated(self.collator, rows, self.layout)
        if ids is None:
            return batch
        count = len(batch["input_ids"])
        batch[EXAMPLE_ID] = per_row(torch.tensor([ids[i] for i in positions], dtype=torch.int64), count)
        for name in self.columns or ():
            values = [_number(rows[i].get(name), name) for i in positions]
            batch[f"{COLUMNS}.{name}"] = per_row(torch.tensor(values, dtype=torch.float32), count)
        if ROW_LENGTHS in batch:
            batch[ROW_LENGTHS] = per_row(batch[ROW_LENGTHS], count)
        return batch


def _number(value: Any, name: str) -> float:
    """A value of a stream's column, NaN where null; what a column of numbers cannot hold is an error."""
    if value is None:
        return float("nan")
    if isinstance(value, numbers.Real | np.generic) or (isinstance(value, torch.Tensor) and value.numel() == 1):
        return float(value)
    raise ValueError(f"Column {name!r} of the stream holds {value!r}, but numbers are needed.")


def collated(collator: Collator, rows: list[dict[str, Any]], layout: Layout) -> tuple[dict[str, Any], list[int]]:
    """
    A collated batch, and the positions in `rows` of its examples.

    Where rows were laid into one (padding-free), the batch says how long each of them is.

    Raises:
        `ValueError`: if the collator is the user's own and its rows cannot be told apart.
    """
    batch = collator(rows)
    positions = matched(batch, rows, layout, collator)
    if positions is None:
        raise ValueError(
            f"The data collator {_name_of(collator)} gives rows whose tokens are those of none of the examples, or "
            "lays several into one row: which example a row is cannot be known. Keep one row per example with its "
            "tokens (it may sort rows or leave some out), or use TRL's collator."
        )
    if batch["input_ids"].shape[0] < len(positions):
        batch[ROW_LENGTHS] = torch.tensor([len(row["input_ids"]) for row in rows])
    return batch, positions


def _name_of(collator: Any) -> str:
    return getattr(collator, "__qualname__", type(collator).__qualname__)


def collator_of(trainer: Any) -> Collator:
    """The collator of the batches that the trainer's selection serves."""
    collator = trainer.data_collator
    return trainer_kind(trainer).regrouped(trainer, collator) if trainer.selection.methods.regroups else collator


def content_id(row: dict[str, Any]) -> int:
    """63-bit hash of what a row holds."""
    plain = json.dumps(row, sort_keys=True, default=_plain)
    return int.from_bytes(hashlib.blake2b(plain.encode(), digest_size=8).digest(), "big") >> 1


def _plain(value: Any) -> Any:
    """The content of what JSON cannot say, the same in every process: no address of an object is part of it."""
    # Arrays of any format count by their values; printed, a long one would be cut short.
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, bytes):
        return hashlib.blake2b(value).hexdigest()
    if hasattr(value, "tobytes"):
        # Of an image the same bytes may be another picture.
        shape = [getattr(value, name, None) for name in ("mode", "size")]
        palette = value.getpalette() if hasattr(value, "getpalette") else None
        return [*shape, palette, hashlib.blake2b(value.tobytes()).hexdigest()]
    if isinstance(encoded := getattr(value, "_hf_encoded", None), dict):
        # Sounds and videos, which `datasets` decodes when they are asked for.
        return encoded
    return type(value).__qualname__ if type(value).__repr__ is object.__repr__ else str(value)


class CollatedRows:
    """Inputs of some rows of a dataset as the trainer's collator gives them, on the training device."""

    def __init__(self, trainer: Any, dataset: Dataset) -> None:
        self.trainer, self.dataset = trainer, dataset
        self._columns: Any = None

    def __call__(self, ids: np.ndarray) -> dict[str, Any]:
        if self._columns is None:
            self._columns = self.trainer._remove_unused_columns(self.dataset, description="Scoring")
        rows, layout = self._columns.__getitems__(np.asarray(ids).tolist()), trainer_kind(self.trainer).layout
        collator = collator_of(self.trainer)
        batch, positions = collated(collator, rows, layout)
        if len(positions) < len(rows):
            raise ValueError(
                f"The data collator {_name_of(collator)} leaves examples out, which therefore cannot be measured: "
                "remove them from the dataset."
            )
        return self.trainer._prepare_inputs(in_order(batch, positions, layout))


def make_rows(trainer: Any, dataset: Dataset, name: str) -> Rows:
    """Rows of a dataset that the trainer has prepared."""
    args, processor = trainer.args, trainer.processing_class
    return Rows(
        name=name,
        dataset=dataset,
        layout=trainer_kind(trainer).layout,
        # The tokenizer of a processor is one of its parts.
        tokenizer=getattr(processor, "tokenizer", processor),
        collate=CollatedRows(trainer, dataset),
        max_length=getattr(args, "max_length", None),
        truncation=getattr(args, "truncation_mode", "keep_start"),
        text_field=getattr(args, "dataset_text_field", "text"),
        collated=_collated_columns(trainer, dataset),
        device=trainer.accelerator.device,
        kept=trainer_kind(trainer).kept,
    )


def _collated_columns(trainer: Any, dataset: Dataset) -> tuple[str, ...]:
    """The columns that the trainer leaves to its collator; all of them where a transform makes what it is given."""
    trainer._set_signature_columns_if_needed()
    names = tuple(dataset.column_names)
    used = tuple(name for name in names if name in trainer._signature_columns)
    return used if used and trainer.args.remove_unused_columns else names


def load_named(trainer: Any, name: str, split: str, key: str) -> Dataset:
    """A dataset by its name, `demo` in the form of this trainer; `key` is the parameter that says the split."""
    return take_split(load_splits(name, demo=trainer_kind(trainer).demo), split, name, key)


def prepare_rows(trainer: Any, dataset: Dataset, name: str) -> Rows:
    """
    Rows of any dataset of the user's, prepared as the trainer prepares its own.

    Raises:
        `ValueError`: if its columns are those of another trainer; the message says what would be right.
    """
    # A function of the user's reads columns of its own.
    if not _is_ready(trainer, dataset) and getattr(trainer, "_formatting_func", None) is None:
        kind, text = trainer_kind(trainer), getattr(trainer.args, "dataset_text_field", None)
        choices = kind.columns if text is None else (*kind.columns, (text,))
        check_rows(dataset, name, choices, kind.trainer.__name__)
    return make_rows(trainer, prepared(trainer, dataset, name), name)


def prepared(trainer: Any, dataset: Any, name: str) -> Any:
    """A dataset as the trainer prepares its own: tokenized, with reference log-probabilities where it keeps them."""
    kind = trainer_kind(trainer)
    if not _is_ready(trainer, dataset):
        arguments = [dataset, trainer.processing_class, trainer.args, *kind.prepare_arguments(trainer)]
        dataset = trainer._prepare_dataset(*arguments, name)
    wanted = getattr(trainer.args, "precompute_ref_log_probs", False)
    if wanted and not set(kind.references) & set(dataset.column_names):
        batch_size = trainer.args.precompute_ref_batch_size or trainer.args.per_device_train_batch_size
        dataset = trainer._precompute_ref_logps(dataset, name, batch_size)
        _count_references(trainer, make_rows(trainer, dataset, name))
    return dataset


def _is_ready(trainer: Any, dataset: Any) -> bool:
    """Whether the trainer would take a dataset as it is: tokenized, or left to the collator."""
    as_it_is = getattr(trainer, "_is_vision_dataset", False) or getattr(trainer, "_skip_prepare_dataset", False)
    return as_it_is or "prompt_ids" in dataset.column_names or "input_ids" in dataset.column_names


def _count_references(trainer: Any, rows: Rows) -> None:
    """Rows that selection prepared went through the reference beside those that the trainer prepared itself."""
    forwards = 1 + int(trainer_kind(trainer).kl(trainer))
    trainer.selection.costs.add("reference_forwards", forwards * len(rows), forwards * int(rows.lengths.sum()))


class TrainingRows:
    """
    The rows that a trainer trains on: what a method builds takes the place of the user's, and gives it back.

    Args:
        trainer:
            The re-typed trainer, with a map-style dataset.
        methods ([`Composition`]):
            The methods of the run.
    """

    def __init__(self, trainer: Any, methods: Composition) -> None:
        self.trainer, self.methods = trainer, methods
        self.user_dataset: Any = None
        self.served: IndexedRows | None = None
        self._user_evaluation: Any = None
        self._built: Any = None
        self._rows = make_rows(trainer, trainer.train_dataset, "train")

    @property
    def rows(self) -> Rows:
        """The training set; what is read of a dataset belongs to that dataset."""
        if self._rows.dataset is not self.trainer.train_dataset:
            self._rows = make_rows(self.trainer, self.trainer.train_dataset, "train")
        return self._rows

    @property
    def user_rows(self) -> Rows | None:
        """The user's own rows, where a method has built others of them."""
        return None if self.user_dataset is None else make_rows(self.trainer, self.user_dataset, "train")

    def serve(self, loader: Any) -> None:
        """The loader that the training iterates: its rows are replaced when others are built."""
        rows = getattr(loader, "dataset", None)
        self.served = rows if isinstance(rows, IndexedRows) else None

    def give_back(self) -> None:
        """Puts the user's own datasets back."""
        if self.user_dataset is not None:
            self.trainer.train_dataset = self.user_dataset
        if self._user_evaluation is not None:
            self.trainer.eval_dataset = self._user_evaluation

    def rebuild(self, run: Run, epoch: int, resumed: bool) -> bool:
        """Lets a method build the dataset of an epoch, kept on disk for a resume; says whether one did."""
        changed = False
        for method in self.methods.using("rebuild"):
            if self.user_dataset is None or self.trainer.train_dataset is not self._built:
                self.user_dataset = self.trainer.train_dataset
            stage = epoch if method.rebuilds_each_epoch else 0
            file = Path(self.trainer.args.output_dir) / "selection" / f"rebuilt-{method.name}-{stage}.parquet"
            if resumed and stage and not file.is_file():
                raise ValueError(f"{file} is missing: it held the dataset that the checkpoint was trained on.")
            before = len(self.trainer.train_dataset)
            dataset = self._build(partial(method.rebuild, run, self.user_dataset), file, resumed)
            if dataset is None:
                continue
            if epoch and not resumed and len(dataset) != before:
                raise ValueError(f"{method.name!r} built {len(dataset)} rows for epoch {epoch}, but {before} before.")
            self._replace(dataset)
            run.training_rows = self.rows
            self._rebuild_evaluation(run, method)
            changed = True
        return changed

    def _build(self, build: Callable[[], Any], file: Path, resumed: bool) -> Any:
        """
        The dataset that `build` gives, prepared by the trainer; `None` where it gives none.

        It is written to `file` by the first process and read back by all, so that every rank trains on the same rows
        and a resumed run finds what it was trained on.
        """
        accelerator = self.trainer.accelerator
        if not (resumed and file.is_file()):
            dataset = build()
            if dataset is None:
                return None
            if accelerator.is_main_process:
                with replacing(file) as temporary:
                    dataset.to_parquet(str(temporary))
            accelerator.wait_for_everyone()
        return prepared(self.trainer, Dataset.from_parquet(str(file), keep_in_memory=True), "train")

    def _replace(self, dataset: Any) -> None:
        """Makes the trainer train on `dataset`, also where its loader is made already."""
        trainer = self.trainer
        if trainer.args.dataloader_persistent_workers and self.served is not None:
            raise ValueError("dataloader_persistent_workers=True keeps the rows of the first epoch: set it to False.")
        trainer.train_dataset = self._built = dataset
        if self.served is not None:
            self.served.dataset = trainer._remove_unused_columns(dataset, description="Rebuilt")

    def _rebuild_evaluation(self, run: Run, method: Method) -> None:
        trainer = self.trainer
        if self._user_evaluation is not None or trainer.eval_dataset is None:
            return
        parts = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {"eval": trainer.eval_dataset}
        built = {name: method.rebuild_evaluation(run, dataset) for name, dataset in parts.items()}
        if all(dataset is None for dataset in built.values()):
            return
        self._user_evaluation = trainer.eval_dataset
        ready = {name: prepared(trainer, dataset, name) for name, dataset in built.items()}
        trainer.eval_dataset = ready if isinstance(trainer.eval_dataset, dict) else ready["eval"]
