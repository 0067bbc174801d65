"""Runs that several contract checks share: each is made once."""

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerCallback

from dsel_trl import Method, SelectionCallback
from tests import tiny
from tests.contract.cases import SIZE, Case, case, make
from tests.contract.decisions import Decisions
from tests.contract.gaps import Gaps, without_numbers

CONFIG = {"num_train_epochs": 2, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}


def data(name: str | None, kind: str) -> Any:
    """The dataset of a case."""
    return tiny.DATASETS[kind](SIZE if name is None else case(name).size)


def loading(workers: int) -> dict[str, Any]:
    """Arguments of a run with loader workers; one epoch does for those that start processes."""
    return {"dataloader_num_workers": workers, **({"num_train_epochs": 1} if workers else {})}


class SaveInside(TrainerCallback):
    """Saves inside each epoch, after its first step."""

    def __init__(self) -> None:
        self.saved: dict[int, int] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        epoch, inside = int(state.epoch), not float(state.epoch).is_integer()
        if inside and epoch not in self.saved:
            self.saved[epoch] = state.global_step
            control.should_save = True
        return control


class KeepAll(Method):
    """Plans, and decides nothing: every example once per epoch, in random order."""

    name = "keep_all"
    packed_rows = True

    def select(self, run: Any) -> np.ndarray:
        return np.ones(run.size, dtype=bool)


@dataclass
class Baseline:
    """What a run without any decision trained; the stock trainer does not say which ids."""

    losses: list[dict[str, float]]
    weights: dict[str, Any]
    ids: list[list[int]] | None = None


@dataclass
class Finished:
    """A finished run: its method, what it was given to train on, what the method decided and what was trained."""

    trainer: Any
    method: Method
    given: Any
    trace: tiny.Trace
    decisions: Decisions
    saved: dict[int, int]
    # What it had cost when it ended: later checks may ask its method again.
    costs: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        self.costs = dict(self.trainer.selection.costs.counts) if hasattr(self.trainer, "selection") else {}

    @property
    def output_dir(self) -> Path:
        return Path(self.trainer.args.output_dir)

    def checkpoint(self, epoch: int) -> Path:
        """The checkpoint that was saved inside an epoch."""
        return self.output_dir / f"checkpoint-{self.saved[epoch]}"


@dataclass
class Bench:
    """Makes trainers with methods on them, and keeps the runs that are looked at more than once."""

    model: Path
    folder: Path
    kept: dict[Any, Any] = field(default_factory=dict)
    made: int = 0

    def trainer(self, kind: str, name: str | None = None, **config: Any) -> Any:
        """A stock trainer on the data of the suite, with what the method `name` needs of it."""
        self.made += 1
        own = {} if name is None else case(name).config
        config = {"dataset": data(name, kind), **CONFIG, **own, **config}
        return tiny.make_trainer(kind, self.model, config.pop("output_dir", self.folder / str(self.made)), **config)

    def attached(self, name: str, kind: str, **config: Any) -> tuple[Any, tiny.Witness]:
        trainer = self.trainer(kind, name, **config)
        witness = tiny.Witness()
        trainer.add_callback(SelectionCallback(trainer, [make(name), witness]))
        return trainer, witness

    def run(self, trainer: Any, method: Method) -> Finished:
        """Trains with a method, saving a checkpoint inside each epoch."""
        witness, saving, given = tiny.Witness(), SaveInside(), trainer.train_dataset
        trainer.add_callback(SelectionCallback(trainer, [method, witness]))
        decisions = Decisions(trainer.selection)
        trainer.add_callback(saving)
        trainer.train()
        return Finished(trainer, method, given, tiny.Trace.of(trainer, witness), decisions, saving.saved)

    def whole(self, name: str, kind: str, workers: int = 0) -> Finished:
        """An undisturbed run that saved a checkpoint inside each epoch."""
        key = ("whole", name, kind, workers)
        return self._once(key, lambda: self.run(self.trainer(kind, name, **loading(workers)), make(name)))

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self.kept:
            self.kept[key] = make()
            # It stays until the end: no collection of garbage need look through it.
            gc.collect()
            gc.freeze()
        return self.kept[key]

    def gappy(self, kind: str, method: Method, name: str | None = None, **config: Any) -> tuple[Finished, Gaps]:
        """A run of a method in which every fourth example cannot be measured."""
        dataset = without_numbers(data(name, kind))
        trainer = self.trainer(kind, name, dataset=dataset, **config)
        witness, gaps, given = tiny.Witness(), Gaps(method), trainer.train_dataset
        trainer.add_callback(SelectionCallback(trainer, [gaps, method, witness]))
        decisions = Decisions(trainer.selection, gaps.known)
        trainer.train()
        return Finished(trainer, method, given, tiny.Trace.of(trainer, witness), decisions, {}), gaps

    def stock(self, kind: str, name: str | None = None, **config: Any) -> Baseline:
        """The stock trainer on the data of a case."""
        return self._baseline("stock", kind, name, config)

    def shuffled(self, kind: str, name: str | None = None) -> Baseline:
        """A method that plans without deciding anything, on the data of a case."""
        return self._baseline("shuffled", kind, name, {})

    def _baseline(self, what: str, kind: str, name: str | None, config: dict[str, Any]) -> Baseline:
        own = Case() if name is None else case(name)
        key = (what, kind, own.size, *sorted({**own.config, **config}.items()))

        def trained() -> Baseline:
            trainer = self.trainer(kind, name, **config)
            witness = tiny.attach(trainer, KeepAll()) if what == "shuffled" else None
            trainer.train()
            ids = None if witness is None else witness.ids
            return Baseline(tiny.losses_of(trainer), tiny.weights_of(trainer), ids)

        return self._once(key, trained)
