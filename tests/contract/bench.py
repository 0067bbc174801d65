"""Runs that several contract checks share: each is made once."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from dsel_trl import SelectionCallback
from tests import tiny
from tests.contract.cases import SIZE, case, make

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


@dataclass
class Finished:
    """A finished run."""

    trainer: Any
    trace: tiny.Trace
    saved: dict[int, int]

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

    def whole(self, name: str, kind: str, workers: int = 0) -> Finished:
        """An undisturbed run that saved a checkpoint inside each epoch."""
        key = ("whole", name, kind, workers)
        if key not in self.kept:
            trainer, witness = self.attached(name, kind, **loading(workers))
            saving = SaveInside()
            trainer.add_callback(saving)
            trainer.train()
            self.kept[key] = Finished(trainer, tiny.Trace.of(trainer, witness), saving.saved)
        return self.kept[key]

    def stock(self, kind: str, name: str, **config: Any) -> tuple[list[dict[str, float]], dict[str, Any]]:
        """Logged rows and final weights of the stock trainer on the data of a case."""
        key = ("stock", kind, case(name).size, *sorted({**case(name).config, **config}.items()))
        if key not in self.kept:
            trainer = self.trainer(kind, name, **config)
            trainer.train()
            self.kept[key] = tiny.losses_of(trainer), tiny.weights_of(trainer)
        return self.kept[key]
