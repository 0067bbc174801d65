"""Rows as the trainer prepares, collates and serves them."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset
from transformers.trainer_pt_utils import BatchRebalanceSampler

from ..sampling.batch_sampler import BatchPlanSampler
from ..signals.batch import ROW_LENGTHS

if TYPE_CHECKING:
    _Trainer = Any
else:
    _Trainer = object
from .kinds import COLUMNS, EXAMPLE_ID, REFERENCES, trainer_kind


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
        _count_references(trainer, dataset)
    return dataset


def _count_references(trainer: Any, dataset: Any) -> None:
    """A dataset that selection built goes through the reference beside the one that the trainer prepared itself."""
    names = [name for name in ("prompt_ids", "chosen_ids", "rejected_ids") if name in dataset.column_names]
    tokens = sum(
        len(ids) * (2 if name == "prompt_ids" else 1) for name in names for ids in dataset.with_format(None)[name]
    )
    trainer.selection.costs.add("reference_forwards", len(dataset), tokens)


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
