"""`SelectionCallback`: joins a trainer and its methods."""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from .core.composition import Composition
from .core.costs import Costs
from .core.data_passes import Passes
from .core.ledger import Ledger
from .core.method import Method
from .core.metrics import Metrics
from .core.registry import create_method
from .core.run import Run
from .core.sidecar import check_fingerprint, part, versions, write_sidecar
from .data.columns import numeric_column, original_positions
from .data.fingerprints import dataset_fingerprint
from .data.lengths import response_lengths, sequence_lengths
from .sampling.batch_sampler import BatchPlanSampler
from .sampling.plan_sampler import PlanSampler
from .signals.tap import Tap
from .trainer import mixin as seams
from .trainer.checkpoints import check_checkpoint
from .trainer.checks import check_run
from .trainer.forwards import base_model, refer, request_outputs, token_count
from .trainer.kinds import EXAMPLE_ID, is_map_style, trainer_kind
from .trainer.rows import collate_rows, prepared, rebuilt, replace_dataset
from .trainer.step import OptimizerStep


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
        **parameters:
            Parameters of a method given by name.

    Raises:
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
        **parameters: Any,
    ) -> None:
        # What the user set
        self.trainer = trainer
        self.methods = Composition(_methods(method, parameters))
        self.resume_across_versions = resume_across_versions

        # What the run keeps
        self.costs = Costs()
        self.kind = trainer_kind(trainer)
        self.streaming = not is_map_style(trainer)
        self._user_dataset: Any = None
        self._user_evaluation: Any = None
        self.rows: Any = None
        self.served_rows: Any = None
        self._columns_read: dict[str, np.ndarray] = {}
        self._lengths_read: tuple[np.ndarray, np.ndarray] | None = None
        self.sampler: PlanSampler | BatchPlanSampler | None = None
        check_run(trainer, self.kind, self.methods, None if self.streaming else self._read_column)
        self._attach()
        self._new_run()

    # ---- Before the first step ----

    @property
    def columns(self) -> tuple[str, ...]:
        """Dataset columns that the methods read."""
        return tuple(dict.fromkeys(name for method in self.methods.methods for name in method.columns))

    @property
    def candidates(self) -> int:
        """Candidates drawn for one trained example."""
        return self.methods.candidates

    @property
    def regroups(self) -> bool:
        """Whether other examples come together in a batch than the trainer would put there."""
        return self.methods.regroups

    @property
    def batch_examples(self) -> int:
        """Examples of one micro-batch over all ranks, candidates included."""
        return self.trainer._train_batch_size * self.trainer.args.world_size * self.candidates

    def _new_run(self) -> None:
        trainer, args = self.trainer, self.trainer.args
        self.ledger = Ledger(None if self.streaming else len(trainer.train_dataset))
        self.run = Run(
            trainer=self.kind,
            size=0 if self.streaming else len(trainer.train_dataset),
            ledger=self.ledger,
            seed=args.seed if args.data_seed is None else args.data_seed,
            epochs=args.num_train_epochs,
            arguments=args,
            output_dir=args.output_dir,
            processing_class=trainer.processing_class,
            dataset=trainer.train_dataset,
            read_column=None if self.streaming else self._read_column,
            read_lengths=None if self.streaming else self._read_lengths,
            write_log=lambda values: self.metrics_window.extra(values),
            model=trainer.model,
            costs=self.costs,
            world=trainer.accelerator.num_processes,
            ordered=bool(self.methods.using("order", "plan")),
            generate=partial(_generate, trainer, costs=self.costs),
            refer=partial(refer, trainer),
        )
        if not self.streaming:
            accelerator = trainer.accelerator
            self.run.passes = Passes(
                rows=partial(collate_rows, trainer),
                lengths=self._read_lengths()[1],
                forward=lambda inputs, ids, **how: self.steps.score_rows(inputs, ids, **how),
                rank=accelerator.process_index,
                world=accelerator.num_processes,
                total=lambda values: accelerator.reduce(values.to(accelerator.device), "sum"),
                costs=self.costs,
            )
        self.steps = OptimizerStep(trainer, self.methods, self.run, self.tap)
        self.metrics_window = Metrics()
        self.sampler = None
        self._fingerprint: dict[str, Any] | None = None
        self._resume: tuple[dict[str, np.ndarray], dict[str, Any]] | None = None

    def _attach(self) -> None:
        trainer = self.trainer
        if getattr(trainer, "selection", None) is not None:
            raise ValueError("This trainer already has a selection: detach it first, or pass the methods as one list.")
        self._stock = type(trainer)
        trainer.__class__ = seams.selective_class(self._stock)
        trainer.selection = self
        trainer._signature_columns = None
        names = tuple(name for method in self.methods.methods for name in method.outputs)
        self._undo_outputs = request_outputs(trainer, names)
        self.tap = Tap(base_model(trainer), getattr(trainer, "ref_model", None))

    def detach(self) -> None:
        """Gives the trainer back as it was: its class, its model's forward, its callbacks."""
        if self.trainer.__dict__.get("selection") is not self:
            return
        self.tap.close()
        self._undo_outputs()
        if self._user_dataset is not None:
            self.trainer.train_dataset = self._user_dataset
        if self._user_evaluation is not None:
            self.trainer.eval_dataset = self._user_evaluation
        self.trainer.__class__ = self._stock
        del self.trainer.selection
        self.trainer._signature_columns = None
        self.trainer.remove_callback(self)

    def begin_run(self, checkpoint: str | None) -> None:
        """Sets the methods up, or takes up the checkpoint; called by `train` before anything else happens."""
        trainer = self.trainer
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        resume = None if checkpoint is None else check_checkpoint(checkpoint)
        self.costs.reset()
        self._rebuild(0 if resume is None else resume[1]["epoch"], resumed=resume is not None)
        self._new_run()
        if resume is not None and checkpoint is not None:
            self._resume = resume
            check_fingerprint(
                resume[1]["fingerprint"], self.fingerprint, checkpoint, across_versions=self.resume_across_versions
            )
            arrays, values = self._resume
            self.ledger.load_state_dict(part(arrays, "ledger"), values["ledger"])
            self.run.resumed = True
            self.run.step, self.run.epoch = values["step"], values["epoch"]
            self.steps.kl = values["kl"]
            self.metrics_window.load_state_dict(values["metrics"])
            self.costs.load_state_dict(values["costs"])
        self.run.proxy = partial(_train_proxy, self)
        for method in self.methods.methods:
            method.check(self.run)
        with self.costs.clock():
            for method in self.methods.using("setup"):
                method.setup(self.run)
        if self._resume is not None:
            for index, method in enumerate(self.methods.methods):
                state = dict(values["methods"][index])
                state.update(part(arrays, f"method{index}"))
                method.load_state_dict(state)

    def make_sampler(self) -> PlanSampler | BatchPlanSampler | None:
        """The sampler that serves the methods' plan, or `None` where no method plans."""
        if not self.methods.plans:
            return None
        self.sampler = self._batch_sampler() if self.methods.using("batch") else self._id_sampler()
        if self._resume is not None:
            arrays, values = self._resume
            self.sampler.load_state_dict(
                part(arrays, "sampler"), values["sampler"], replay=not self.trainer.args.ignore_data_skip
            )
        return self.sampler

    @property
    def _saved_length(self) -> int | None:
        """Epoch length of the run that is continued: measured anew, live scores would give another."""
        return None if self._resume is None else int(self._resume[1]["sampler"]["length"])

    def _batch_sampler(self) -> BatchPlanSampler:
        length = self._saved_length
        if length is None:
            # The epoch is as long as its first plan, or its share of it where a method says that it will need less.
            with self.costs.clock():
                batches = self.methods.plan_batches(self.run)[0]
            planned, wanted = sum(map(len, batches)), self.methods.epoch_size(self.run)
            length = -(-len(batches) * min(wanted, planned) // (planned * self.run.world))
        return BatchPlanSampler(
            self._plan_batches,
            length,
            self.trainer.accelerator.process_index,
            self.run.world,
            self.trainer.args.gradient_accumulation_steps,
        )

    def _id_sampler(self) -> PlanSampler:
        length = self._saved_length
        if length is None:
            with self.costs.clock():
                length = self.methods.epoch_size(self.run)
        if length < self.batch_examples:
            raise ValueError(
                f"Only {length} of {self.run.size} examples would be kept per epoch, fewer than one batch of "
                f"{self.batch_examples}. Keep more, or use a smaller batch."
            )
        return PlanSampler(self._plan, length, self.batch_examples, self.methods.carry_over)

    def _plan(self, served: np.ndarray, plans_made: int) -> np.ndarray:
        self.run.served, self.run.plans_made = served, plans_made
        with self.costs.clock():
            ids, kept = self.methods.plan(self.run)
        self.metrics_window.planned(kept, self.run.lengths)
        return ids

    def _plan_batches(self, served: np.ndarray, plans_made: int) -> list[np.ndarray]:
        self.run.served, self.run.plans_made = served, plans_made
        with self.costs.clock():
            batches, kept = self.methods.plan_batches(self.run)
        self.metrics_window.planned(kept, self.run.lengths)
        return batches

    def _rebuild(self, epoch: int, resumed: bool) -> None:
        """Lets a method build the dataset of an epoch; what it built is kept on disk, for a resume."""
        for method in self.methods.using("rebuild"):
            stage = epoch if method.rebuilds_each_epoch else 0
            file = Path(self.trainer.args.output_dir) / "selection" / f"rebuilt-{method.name}-{stage}.parquet"
            if resumed and stage and not file.is_file():
                raise ValueError(f"{file} is missing: it held the dataset that the checkpoint was trained on.")
            if self._user_dataset is None:
                self._user_dataset = self.trainer.train_dataset
            before = len(self.trainer.train_dataset)
            with self.costs.clock():
                dataset = rebuilt(self.trainer, partial(method.rebuild, self.run, self._user_dataset), file, resumed)
            if dataset is None:
                continue
            if epoch and not resumed and len(dataset) != before:
                raise ValueError(f"{method.name!r} built {len(dataset)} rows for epoch {epoch}, but {before} before.")
            replace_dataset(self.trainer, dataset)
            self._columns_read, self._lengths_read, self._fingerprint = {}, None, None
            self.run.dataset = dataset
            if self.run.passes is not None:
                self.run.passes.lengths = self._read_lengths()[1]
            self._rebuild_evaluation(method)

    def _rebuild_evaluation(self, method: Method) -> None:
        trainer = self.trainer
        if self._user_evaluation is not None or trainer.eval_dataset is None:
            return
        parts = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {"eval": trainer.eval_dataset}
        built = {name: method.rebuild_evaluation(self.run, dataset) for name, dataset in parts.items()}
        if all(dataset is None for dataset in built.values()):
            return
        self._user_evaluation = trainer.eval_dataset
        ready = {name: prepared(trainer, dataset, name) for name, dataset in built.items()}
        trainer.eval_dataset = ready if isinstance(trainer.eval_dataset, dict) else ready["eval"]

    # ---- Trainer events ----

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.run.max_steps, self.run.epochs = state.max_steps, state.num_train_epochs
        self.run.step = state.global_step
        self.run.epoch = int(state.epoch or 0)
        if self._resume is not None and self.run.epoch > self._resume[1]["epoch"]:
            # The checkpoint is from the end of an epoch: the dataset of the next one is built of the policy it holds.
            self._rebuild_next()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.run.epoch += 1
        self._rebuild_next()

    def _rebuild_next(self) -> None:
        if self.run.epoch < self.run.epochs and any(m.rebuilds_each_epoch for m in self.methods.using("rebuild")):
            self._rebuild(self.run.epoch, resumed=False)

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
        served = 0 if self.sampler is None else len(self.sampler.history)
        self.metrics_window.step(step, served)
        if self.sampler is not None and self.methods.due(self.run):
            self.sampler.due = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not args.should_save:
            return
        from .report.run_files import write_run

        write_run(
            Path(args.output_dir) / "selection",
            self.ledger,
            ids=None if self.streaming else original_positions(self.trainer.train_dataset),
            summary={
                "methods": [method.describe() for method in self.methods.methods],
                "trainer": type(self.trainer).__name__.removeprefix("Selective"),
                "seed": self.run.seed,
                "steps": state.global_step,
                **self.metrics_window.summary(self.ledger),
                "cost": self.costs.summary(self.run.size),
            },
            history=self.metrics_window.history,
        )

    def pick(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Scores an oversized candidate batch without gradient and returns the rows to train on."""
        with self.costs.clock():
            return self._pick(inputs)

    def _pick(self, inputs: dict[str, Any]) -> dict[str, Any]:
        (method,) = self.methods.using("pick")
        own_ids = inputs[EXAMPLE_ID].cpu()
        with self.costs.collecting() as ran:
            candidates = (
                self.steps.score_rows(inputs, own_ids, reference=method.references)
                if method.scores_candidates
                else self.steps.unscored(inputs, own_ids)
            )
        ids, _ = candidates.gather(candidates.ids)
        tokens, _ = candidates.gather(torch.tensor([token_count(inputs)], device=candidates.ids.device))
        self.costs.add_all(ran, len(ids), int(tokens.sum()))
        positions = method.pick(self.run, candidates).cpu()
        rank, world = self.trainer.accelerator.process_index, self.trainer.accelerator.num_processes
        if len(positions) < world:
            # The last candidates of an epoch may be too few to choose from: every rank still trains one of them.
            rest = np.setdiff1d(np.arange(len(ids)), positions.numpy())
            positions = torch.cat([positions, torch.from_numpy(rest)])[:world]
        chosen = ids.cpu()[positions]
        share = len(chosen) // world
        own = chosen[rank * share : (rank + 1) * share]
        self.metrics_window.picked(len(ids), share * world)
        # The chosen rows may lie on another rank: each rank collates its share from the dataset.
        batch = collate_rows(self.trainer, own.numpy())
        batch[EXAMPLE_ID] = own.to(inputs[EXAMPLE_ID].device)
        return batch

    def metrics(self) -> dict[str, float]:
        """What is logged beside the trainer's own values, as `selection/*`."""
        return self.metrics_window.row(self.ledger, self.run)

    # ---- The dataset ----

    def _read_column(self, name: str) -> np.ndarray:
        if name not in self._columns_read:
            self._columns_read[name] = numeric_column(self.trainer.train_dataset, name)
        return self._columns_read[name]

    def _read_lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """Completion tokens and trained tokens of each example, after the trainer's truncation."""
        if self._lengths_read is None:
            dataset, limit = self.trainer.train_dataset, getattr(self.trainer.args, "max_length", None)
            if self.kind == "sft":
                self._lengths_read = sequence_lengths(dataset)
            else:
                sides = ("completion",) if self.kind == "kto" else ("chosen", "rejected")
                self._lengths_read = response_lengths(dataset, limit, sides)
        return self._lengths_read

    # ---- Checkpoints ----

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to be continued."""
        if self._fingerprint is None:
            dataset = "stream" if self.streaming else dataset_fingerprint(self.trainer.train_dataset, self.columns)
            if self._user_dataset is not None:
                dataset = f"{dataset} of {dataset_fingerprint(self._user_dataset, self.columns)}"
            self._fingerprint = {
                "dataset": dataset,
                "methods": [method.describe() for method in self.methods.methods],
                "seed": self.run.seed,
                "examples per batch": self.batch_examples,
                "gradient_accumulation_steps": self.trainer.args.gradient_accumulation_steps,
                "versions": versions(),
            }
        return self._fingerprint

    def save(self, checkpoint: str | os.PathLike) -> None:
        """Writes the state of the selection into `checkpoint/selection`."""
        arrays, ledger = self.ledger.state_dict()
        arrays = {f"ledger/{name}": array for name, array in arrays.items()}
        values: dict[str, Any] = {
            "fingerprint": self.fingerprint,
            "step": self.run.step,
            "epoch": self.run.epoch,
            "kl": float(self.steps.kl),
            "ledger": ledger,
            "metrics": self.metrics_window.state_dict(),
            "costs": self.costs.state_dict(),
            "methods": [],
        }
        if self.sampler is not None:
            mid_epoch = not float(self.trainer.state.epoch).is_integer()
            sampler_arrays, values["sampler"] = self.sampler.state_dict(mid_epoch)
            arrays.update({f"sampler/{name}": array for name, array in sampler_arrays.items()})
        for index, method in enumerate(self.methods.methods):
            state = method.state_dict()
            arrays.update(
                {f"method{index}/{name}": value for name, value in state.items() if isinstance(value, np.ndarray)}
            )
            values["methods"].append({k: v for k, v in state.items() if not isinstance(v, np.ndarray)})
        write_sidecar(Path(checkpoint) / "selection", arrays, values)


def _methods(method: Any, parameters: dict[str, Any]) -> list[Method]:
    if isinstance(method, str):
        return [create_method(method, **parameters)]
    if parameters:
        raise ValueError(f"Parameters {sorted(parameters)} go with a method given by name; set them on the method.")
    if isinstance(method, Method):
        return [method]
    if isinstance(method, type) or not isinstance(method, Sequence):
        raise TypeError(f"method must be a Method object, a name or a list of them, got {method!r}.")
    return [create_method(item) if isinstance(item, str) else item for item in method]


def _generate(trainer: Any, *args: Any, **kwargs: Any) -> list[list[str]]:
    from .trainer.generation import generate

    return generate(trainer, *args, **kwargs)


def _train_proxy(callback: SelectionCallback, *args: Any, **kwargs: Any) -> Any:
    from .trainer.helper_run import train_proxy

    return train_proxy(callback.trainer, *args, **kwargs)
