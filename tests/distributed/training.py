"""One training as a specification says, in this process; run by `forked.py`, or directly under torchrun."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import TrainerState
from trl.trainer.base_trainer import _BaseTrainer

from dsel_trl import SelectionCallback, create_method
from dsel_trl.core import sidecar
from dsel_trl.report import run_files
from tests import live, tiny
from tests.distributed import fsdp2
from tests.weighted import half_weighted


def kill() -> None:
    """The end of this process, without a chance to tidy up."""
    os.kill(os.getpid(), signal.SIGKILL)


class KillAt(TrainerCallback):
    """Kills this process when the trainer reaches an event for the n-th time."""

    def __init__(self, event: str, count: int) -> None:
        self.left = count
        setattr(self, event, self._reached)

    def _reached(self, *args: Any, **kwargs: Any) -> None:
        self.left -= 1
        if self.left == 0:
            kill()


def kill_while_saving(place: str, count: int) -> None:
    """Kills this process at a place inside the writing of the `count`-th checkpoint."""
    left = [count]

    def now() -> bool:
        left[0] -= 1
        return left[0] == 0

    def before(owner: Any, name: str) -> None:
        own = getattr(owner, name)

        def killing(*args: Any, **kwargs: Any) -> Any:
            if now():
                kill()
            return own(*args, **kwargs)

        setattr(owner, name, killing)

    def half_of_state(self: TrainerState, path: str) -> None:
        text = json.dumps({"step": self.global_step, "filler": "x" * 100})
        if now():
            Path(path).write_text(text[: len(text) // 2])
            kill()
        stock_save(self, path)

    stock_save = TrainerState.save_to_json
    if place == "sidecar_tensors":
        before(sidecar, "_sha256")
    elif place == "sidecar_json":
        before(sidecar, "write_json")
    elif place == "model":
        before(Trainer, "_save")
    elif place == "optimizer":
        before(Trainer, "_save_optimizer_and_scheduler")
    elif place == "rng":
        before(Trainer, "_save_rng_state")
    elif place == "trainer_state":
        TrainerState.save_to_json = half_of_state
    elif place == "rotation":
        import transformers.trainer

        before(transformers.trainer, "rotate_checkpoints")
    else:
        raise ValueError(place)


def make_methods(names: list[Any]) -> list[Any]:
    """Methods by name, with parameters where an item is a pair."""
    made = []
    for item in names:
        name, parameters = item if isinstance(item, list) else (item, {})
        made.append(live.METHODS[name](**parameters) if name in live.METHODS else create_method(name, **parameters))
    return made


def train(spec: dict[str, Any]) -> None:
    """Trains as `spec` says; the first process leaves a trace at `spec["trace"]`."""
    run_files.draw_run = _BaseTrainer.create_model_card = lambda *args, **kwargs: None
    if spec.get("fsdp2"):
        fsdp2.shard()
    dataset = tiny.DATASETS[spec["kind"]](spec.get("size", 21))
    if "swapped" in spec:
        dataset = half_weighted(spec["kind"], spec["swapped"], spec["even"])
    if spec.get("stream"):
        dataset = dataset.to_iterable_dataset()
    trainer = tiny.make_trainer(spec["kind"], spec["model"], spec["output_dir"], dataset=dataset, **spec["config"])
    witness = tiny.Witness()
    methods = [*make_methods(spec["methods"]), witness]
    trainer.add_callback(SelectionCallback(trainer, methods, resume_with_other_batches=spec.get("leave", False)))
    killed = spec.get("kill")
    if killed and killed.get("rank", 0) == trainer.args.process_index:
        if killed["event"].startswith("on_"):
            trainer.add_callback(KillAt(killed["event"], killed["count"]))
        else:
            kill_while_saving(killed["event"], killed["count"])
    trainer.train(resume_from_checkpoint=spec.get("resume", False))
    if spec.get("fsdp2"):
        fsdp2.assert_sharded(trainer)
    if deepspeed := spec["config"].get("deepspeed"):
        assert trainer.deepspeed.zero_optimization_stage() == deepspeed["zero_optimization"]["stage"]
    if "trace" in spec:
        # Sharded weights are put together by all processes.
        trace = tiny.Trace.of(trainer, witness)
        if trainer.args.process_index == 0:
            torch.save(trace, spec["trace"])


if __name__ == "__main__":
    train(json.loads(Path(sys.argv[1]).read_text()))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
