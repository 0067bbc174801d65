"""The seams between a TRL trainer and the selection: ordinary methods that call `super()`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..sampling.batch_sampler import BatchPlanSampler
from ..signals.batch import ROW_LENGTHS
from .batches import check_restart, move_schedule
from .checkpoints import last_complete_checkpoint, saved_batch_size
from .kinds import COLUMNS, EXAMPLE_ID
from .rows import ExampleCollator, IndexedRows, PlannedBatches, collator_of

# What the mixin stands before is known only where it is used.
_Trainer: Any = object


class SelectionMixin(_Trainer):
    """
    Joins a TRL trainer with a [`SelectionCallback`]: before a trainer class, or set on an instance by the callback.

    Every seam is an ordinary method that calls `super()`; without a selection each of them is the trainer's own.
    """

    # The [`SelectionCallback`] that is attached, if any.
    selection: Any = None
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
            if resume_from_checkpoint and self.args.auto_find_batch_size:
                # The size that was found, which the trainer takes up again as well.
                self._train_batch_size = saved_batch_size(resume_from_checkpoint) or self._train_batch_size
            self.selection.begin_run(resume_from_checkpoint or None)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _inner_training_loop(self, batch_size: int | None = None, *args: Any, **kwargs: Any) -> Any:
        if self.selection is not None:
            if self.args.auto_find_batch_size and batch_size:
                self._train_batch_size = batch_size
            self.selection.begin_attempt()
        return super()._inner_training_loop(batch_size, *args, **kwargs)

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: Any,
        trial: Any,
    ) -> tuple[int, int]:
        epochs, skipped = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if self.selection is None or self.selection.next_epoch is None:
            return epochs, skipped
        epochs = self.selection.next_epoch
        step = epochs * num_update_steps_per_epoch
        check_restart(self.args.output_dir, epochs, step, max_steps)
        # As though the epochs so far had been of the new batches: then all that is counted in steps goes together.
        self.state.global_step, self.state.epoch = step, float(epochs)
        return epochs, 0

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.selection is not None and self.selection.next_epoch is not None:
            move_schedule(self.lr_scheduler, self.state.global_step)

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        dataset = super()._remove_unused_columns(dataset, description=description)
        if self.selection is None or description != "Training":
            return dataset
        return IndexedRows(dataset)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self.selection is not None and self.selection.streaming:
            missing = [name for name in self.selection.columns if name not in self._signature_columns]
            self._signature_columns = [*self._signature_columns, *missing]

    def get_train_dataloader(self) -> Any:
        if self.selection is None:
            return super().get_train_dataloader()
        collator, batch_size = self.data_collator, self._train_batch_size
        columns = self.selection.columns if self.selection.streaming else None
        self.data_collator = ExampleCollator(collator_of(self), self.selection.kind.layout, columns)
        self._train_batch_size = batch_size * self.selection.methods.candidates
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator, self._train_batch_size = collator, batch_size

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.selection is None or not isinstance(train_dataset, IndexedRows):
            return super()._get_train_sampler(train_dataset)
        sampler = self.selection.serving.make_sampler()
        if sampler is None:
            return super()._get_train_sampler(train_dataset.dataset)
        train_dataset.sampler = sampler
        return PlannedBatches(sampler) if isinstance(sampler, BatchPlanSampler) else sampler

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> tuple[list, Any]:
        if self.selection is not None:
            if self.selection.methods.candidates > 1:
                epoch_iterator = map(self.selection.pick, epoch_iterator)
            batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
            self.selection.steps.begin(len(batches))
            return batches, count
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        try:
            loss = super().training_step(model, inputs, *args, **kwargs)
        except BaseException:
            if self.selection is not None:
                self.selection.run.gradients.close()
            raise
        if self.selection is not None:
            self.selection.steps.after_backward()
        if self.selection is not None and self.accelerator.sync_gradients:
            scale = self.selection.steps.accumulated_scale()
            if scale != 1.0:
                torch._foreach_mul_([p.grad for p in model.parameters() if p.grad is not None], scale)
            self.selection.steps.about_to_move()
        return loss

    def _clip_grad_norm(self, model: Any) -> Any:
        norm = super()._clip_grad_norm(model)
        if self.selection is not None and norm is not None:
            self.selection.steps.clipped(norm)
        return norm

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        own = [key for key in inputs if key in (EXAMPLE_ID, ROW_LENGTHS) or key.startswith(f"{COLUMNS}.")]
        beside = {key: inputs.pop(key) for key in own}
        if self.selection is None or not self.model.training or not self.selection.steps.takes(beside):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with self.selection.steps.listen(beside, inputs) as listening:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        extra = self.selection.steps.after_forward(listening, num_items_in_batch)
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
        if self.selection is not None:
            for method in self.selection.methods.methods:
                method.collect(self.selection.run)
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


def join(trainer: Any, selection: Any) -> None:
    """Re-types a trainer in place, so that its seams call `selection`."""
    trainer.__class__ = selective_class(type(trainer))
    trainer.selection = selection
    # What the trainer has worked out of its own signature; a stream's columns are added to it.
    trainer._signature_columns = None


def part(trainer: Any) -> None:
    """Gives a trainer its own class back."""
    trainer.__class__ = stock_class(type(trainer))
    del trainer.selection
    trainer._signature_columns = None


def stock_class(cls: type) -> type:
    """The class that `selective_class` was given."""
    return next((stock for stock, selective in _CLASSES.items() if selective is cls), cls)
