"""`SelectionCallback`: joins a trainer and its methods."""

import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from .core.composition import Composition
from .core.costs import Costs
from .core.groups import Groups
from .core.identical import IDENTICAL, DropIdentical, identical_notice
from .core.ledger import Ledger
from .core.method import Method, naming
from .core.metrics import Metrics
from .core.parameters import check_choice
from .core.registry import as_methods
from .core.sidecar import check_fingerprint
from .report.run_files import write_run
from .signals.tap import Tap
from .trainer.batches import Batches, difference, restart_notice, trained_share
from .trainer.checkpoints import SavedSelection, read_selection, selection_fingerprint, write_selection
from .trainer.checks import check_run
from .trainer.forwards import heard_model, model_around, own_outputs, request_outputs
from .trainer.internals import check_internals
from .trainer.kinds import is_map_style, trainer_kind
from .trainer.mixin import join, part
from .trainer.rows import TrainingRows
from .trainer.run import run_of
from .trainer.serving import Serving
from .trainer.step import OptimizerStep

logger = logging.getLogger(__name__)


class SelectionCallback(TrainerCallback):
    """
    Lets methods decide which examples a TRL trainer learns from, in which order and with which weight.

    Args:
        trainer ([`~trl.DPOTrainer`], [`~trl.SFTTrainer`], [`~trl.KTOTrainer`] or [`~trl.RewardTrainer`]):
            The trainer, constructed and not yet trained. It is re-typed in place; `detach()` undoes it.
        method ([`Method`], `str`, or a list of them):
            What to do. A name takes its parameters from the keyword arguments; a list is composed: weights multiply,
            kept sets intersect, at most one orders.
        resume_across_versions (`bool`, *optional*, defaults to `False`):
            Whether a checkpoint made with other versions of the libraries may be continued (then it need not be
            bit-identical to an undisturbed run).
        resume_with_other_batches (`bool`, *optional*, defaults to `False`):
            Whether a checkpoint may be continued with other batches (batch size, accumulation, processes) where that
            cannot be exact. Then the rest of its unfinished epoch is left out, with a warning that says how much, and
            training goes on with the next one; ledger and methods keep what they know. Steps are counted as though
            the epochs so far, the unfinished one included, had been trained with the new batches: `global_step` is
            their number times the new steps per epoch, and the learning rate is that of this step in the schedule
            of the new length. With as many examples per optimizer step a run is mostly continued exactly, and
            needs no leave.
        log_by (`str`, *optional*):
            Column of texts, such as `"source"`, by whose values (at most 50) loss, margin, kept share, weight and
            tokens are logged apart, as `selection/<column>=<value>/...`.
        identical (`str`, *optional*, defaults to `"warn"`):
            What is done about pairs whose two sides are equal after truncation to `max_length`, which no preference
            can be learned from: `"warn"` counts them when training starts, `"drop"` leaves them out.
        **parameters:
            Parameters of a method given by name.

    Raises:
        `ImportError`: where the installed TRL or transformers lacks what is used of it.
        `TypeError`: for a trainer that is not supported.
        `ValueError`: for anything the methods cannot work with (a missing column, a loss without per-example values, a
            dataset smaller than a batch, a mistyped parameter). Nothing has been changed then.

    Example:

    ```python
    >>> trainer = DPOTrainer("my-model", args=DPOConfig("out"), train_dataset=dataset)
    >>> trainer.add_callback(SelectionCallback(trainer, "alignment_potential", keep=0.4))
    >>> trainer.train()
    ```
    """

    def __init__(
        self,
        trainer: Any,
        method: Method | str | Sequence[Method | str],
        *,
        resume_across_versions: bool = False,
        resume_with_other_batches: bool = False,
        log_by: str | None = None,
        identical: str = "warn",
        **parameters: Any,
    ) -> None:
        # What the user set
        self.trainer = trainer
        self.methods = Composition(as_methods(method, parameters))
        self.resume_across_versions = resume_across_versions
        self.resume_with_other_batches = resume_with_other_batches
        self.log_by = log_by
        check_choice("identical", identical, IDENTICAL)
        self.identical = identical

        # What the run keeps
        # Where the rows came from, for `summary.json`: `dsel export` and `dsel report` read them again.
        self.source: dict[str, Any] | None = None
        # A folder for what is measured before training, which several runs share; each is charged for it.
        self.shared: Path | None = None
        self.next_epoch: int | None = None
        self.costs = Costs()
        self._attempted, self._checkpoint = False, None  # type: bool, str | None
        self._told: set[str] = set()
        self.kind = trainer_kind(trainer)
        check_internals(trainer, self.kind)
        self.streaming = not is_map_style(trainer)
        if self.streaming and log_by is not None:
            raise ValueError(
                f"log_by={log_by!r} needs the rows of a dataset, but this one is a stream: load it whole."
            )
        self.training = None if self.streaming else TrainingRows(trainer, self.methods)
        if identical == "drop":
            self._drop_identical()
        check_run(trainer, self.kind, self.methods, self.training)
        self._attach()
        try:
            self._new_run(None)
        except BaseException:
            self.detach()
            raise

    @property
    def columns(self) -> tuple[str, ...]:
        """Dataset columns that the methods read."""
        return tuple(dict.fromkeys(name for method in self.methods.methods for name in method.columns))

    def _drop_identical(self) -> None:
        """Leaves out pairs that teach nothing; where there are none the run stays what it is."""
        if self.training is None:
            raise ValueError("identical='drop' needs the rows of a dataset, but this one is a stream: load it whole.")
        if not self.kind.layout.pairs:
            raise ValueError(f"identical='drop' is of pairs, which {type(self.trainer).__name__} does not train on.")
        if self.methods.using("rebuild") or self.training.rows.identical.any():
            self.methods = self.training.methods = Composition([*self.methods.methods, DropIdentical()])

    def _tell_identical(self) -> None:
        if self.training is None or not self.kind.layout.pairs or not self.training.rows.tokenized:
            return
        count = int(self.training.rows.identical.sum())
        if count and self.identical == "warn":
            self._tell("identical", identical_notice(self.training.rows), logging.WARNING)
        self.metrics_window.identical = count

    def _attach(self) -> None:
        trainer = self.trainer
        if getattr(trainer, "selection", None) is not None:
            raise ValueError("This trainer already has a selection: detach it first, or pass the methods as one list.")
        join(trainer, self)
        names = tuple(name for method in self.methods.methods for name in method.outputs)
        self._undo_outputs = request_outputs(trainer, names)
        outputs = (*names, *own_outputs(trainer))
        self.tap = Tap(heard_model(trainer), getattr(trainer, "ref_model", None), outputs, model_around(trainer))

    def detach(self) -> None:
        """Gives the trainer back as it was: its class, its model's forward, its callbacks."""
        if self.trainer.__dict__.get("selection") is not self:
            return
        self.tap.close()
        self._undo_outputs()
        if self.training is not None:
            self.training.give_back()
        part(self.trainer)
        # Not there yet where it was refused on the way.
        if self in self.trainer.callback_handler.callbacks:
            self.trainer.remove_callback(self)

    def _new_run(self, saved: SavedSelection | None) -> None:
        trainer = self.trainer
        rows = None if self.training is None else self.training.rows
        self.ledger = Ledger(None if rows is None else len(rows))
        self.metrics_window = Metrics(None if rows is None or self.log_by is None else Groups.of(rows, self.log_by))
        self.run = run_of(
            trainer,
            rows,
            self.ledger,
            self.costs,
            lambda inputs, ids, **how: self.steps.score_rows(inputs, ids, **how),
            loss=lambda rows, ids: self.steps.loss(rows, ids),
            log=self.metrics_window.extra,
            tell=self._tell,
            shared=self.shared,
            ordered=bool(self.methods.using("order", "plan")),
        )
        self.steps: OptimizerStep = OptimizerStep(
            trainer, self.methods, self.run, self.tap, readers=() if self.log_by is None else ("log_by",)
        )
        self.serving = Serving(
            trainer, self.methods, self.run, self.metrics_window, saved, self.next_epoch is not None
        )
        self._fingerprint: dict[str, Any] | None = None

    def begin_attempt(self) -> None:
        """Called when the training loop is entered: a further time, a failed attempt is forgotten."""
        if self._attempted:
            self.begin_run(self._checkpoint)
        self._attempted = True

    def _tell(self, key: str, text: str, level: int) -> None:
        """Says something of the choice, once in a run and by one process, and keeps it for the summary."""
        self.metrics_window.notes[key] = text
        if key not in self._told and self.trainer.accelerator.is_main_process:
            logger.log(level, text)
        self._told.add(key)

    def begin_run(self, checkpoint: str | None) -> None:
        """Sets the methods up, or takes up the checkpoint; called by `train` before anything else happens."""
        self._attempted, self._checkpoint = False, checkpoint
        callbacks = self.trainer.callback_handler.callbacks
        if self not in callbacks:
            self.trainer.add_callback(self)
        # Added twice it would count every step twice.
        for _ in range(callbacks.count(self) - 1):
            callbacks.remove(self)
        # The dataset may be another one than when the callback was made.
        check_run(self.trainer, self.kind, self.methods, self.training)
        for method in self.methods.methods:
            method.reset()
        saved = None if checkpoint is None else read_selection(checkpoint)
        self.costs.reset()
        self._saved_epoch = 0 if saved is None else int(saved.values["epoch"])
        if self.training is not None:
            with self.costs.clock():
                self.training.rebuild(self.run, self._saved_epoch, resumed=saved is not None)
        self.next_epoch = None
        self._new_run(saved)
        if saved is not None:
            check_fingerprint(
                saved.values["fingerprint"],
                self.fingerprint,
                saved.folder,
                across_versions=self.resume_across_versions,
            )
            self._take_batches(saved)
            saved.restore(self.run, self.ledger, self.metrics_window)
            self.steps.kl = saved.values["kl"]
        self._tell_identical()
        for method in self.methods.methods:
            with naming(method):
                method.check(self.run)
        for method in self.methods.using("setup"):
            with naming(method), self.costs.clock():
                method.setup(self.run)
        if saved is not None:
            saved.restore_methods(self.methods.methods)
        # Made now: data that cannot be told apart must not fail the first save.
        _ = self.fingerprint

    def _take_batches(self, saved: SavedSelection) -> None:
        """Batches of another shape: nothing to do where they go on exactly, else the next epoch with leave."""
        before, now = saved.batches, Batches.of(self.trainer)
        size: int | None = None if self.training is None else len(self.training.rows)
        sampler = saved.values.get("sampler")
        if sampler is not None and not self.methods.using("batch"):
            size = int(sampler["length"])
        reason = difference(before, now, self.trainer, self.methods, size)
        if reason is None:
            return
        if not self.resume_with_other_batches:
            raise ValueError(
                f"{saved.folder} was trained with {before}, this run has {now}, and {reason}: it cannot be continued "
                "exactly. Set batch size, accumulation and processes as they were, or resume_with_other_batches=True "
                "to leave out the rest of the unfinished epoch and go on with the next one."
            )
        epochs = trained_share(saved.folder)
        self.next_epoch = math.ceil(epochs)
        self.serving = Serving(self.trainer, self.methods, self.run, self.metrics_window, saved, anew=True)
        per_epoch = None if self.methods.using("batch") else size
        notice = restart_notice(saved.folder, before, now, reason, epochs, per_epoch)
        self._tell("resumed", notice, logging.WARNING)

    def _rebuild_next(self) -> None:
        """Between epochs: the dataset of the next one, where a method builds it anew."""
        again = any(method.rebuilds_each_epoch for method in self.methods.using("rebuild"))
        if self.training is None or not again or self.run.epoch >= self.run.epochs:
            return
        with self.costs.clock():
            changed = self.training.rebuild(self.run, self.run.epoch, resumed=False)
        if changed:
            self._fingerprint = None
            if self.log_by is not None:
                self.metrics_window.groups = Groups.of(self.training.rows, self.log_by)

    # ---- Trainer events ----

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state is not self.trainer.state:
            raise ValueError(
                "This selection was made for another trainer than the one it was added to, which it cannot act on: "
                "make it anew, trainer.add_callback(SelectionCallback(trainer, ...)) with one and the same trainer."
            )
        self.run.max_steps, self.run.epochs = state.max_steps, state.num_train_epochs
        self.run.step = state.global_step
        self.run.epoch = int(state.epoch or 0)
        loader = kwargs.get("train_dataloader")
        self.serving.serve(loader)
        if self.training is not None:
            self.training.serve(loader)
        if self.run.resumed and self.run.epoch > self._saved_epoch:
            # The checkpoint is from the end of an epoch: the dataset of the next one is built of the policy it holds.
            self._rebuild_next()
        # FSDP may have put the model into another one.
        self.run.model = self.trainer.model
        with self.costs.clock():
            for method in self.methods.using("begin"):
                method.begin(self.run)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.run.epoch += 1
        self._rebuild_next()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.run.step = state.global_step
        step = self.steps.exchange()
        if step is None:
            return
        self.ledger.visit(step.ids)
        for name, values in step.values.items():
            if name != "length":
                self.ledger.write(name, step.ids, values, self.run.step)
        with self.costs.clock():
            for method in self.methods.using("observe"):
                method.observe(self.run, step)
        self.metrics_window.step(step, self.serving.served)
        self.serving.step_done()
        if self.serving.through:
            # As the trainer does at its own last step.
            control.should_training_stop = True
            control.should_save |= args.save_strategy == "steps"
            control.should_evaluate |= args.eval_strategy == "steps" and args.eval_delay <= state.global_step

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not args.should_save:
            return
        write_run(
            Path(args.output_dir) / "selection",
            self.ledger,
            ids=None if self.training is None else self.training.rows.positions,
            summary={
                "methods": [method.describe() for method in self.methods.methods],
                "trainer": type(self.trainer).__name__.removeprefix("Selective"),
                "kind": self.kind.name,
                "dataset": self.source,
                "seed": self.run.seed,
                "steps": state.global_step,
                **self.metrics_window.summary(self.ledger),
                "cost": self.costs.summary(self.run.size),
            },
            history=self.metrics_window.history,
        )

    # ---- Called by the trainer's seams ----

    def pick(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The rows to train on out of an oversized candidate batch."""
        with self.costs.clock():
            return self.steps.pick(inputs, self.metrics_window)

    def metrics(self) -> dict[str, float]:
        """What is logged beside the trainer's own values, as `selection/*`."""
        return self.metrics_window.row(self.ledger, self.run)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to be continued."""
        if self._fingerprint is None:
            user_rows = None if self.training is None else self.training.user_rows
            self._fingerprint = selection_fingerprint(self.run, self.methods.methods, self.columns, user_rows)
        return self._fingerprint

    def save(self, checkpoint: str | os.PathLike) -> None:
        """Writes the state of the selection into `checkpoint/selection`."""
        write_selection(
            checkpoint,
            fingerprint=self.fingerprint,
            run=self.run,
            ledger=self.ledger,
            metrics=self.metrics_window,
            methods=self.methods.methods,
            sampler=self.serving.sampler,
            mid_epoch=not float(self.trainer.state.epoch).is_integer(),
            kl=float(self.steps.kl),
            batches=Batches.of(self.trainer),
        )
