"""One training of an ablation: what it is told, what comes of it, and the process that runs one after the other."""

import gc
import hashlib
import json
import logging
import math
import os
import queue
import stat
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import TrainerCallback, set_seed

from ..core.costs import WORK
from ..core.randomness import preserved_rng
from ..core.sidecar import versions
from ..data.files import write_json
from ..functional.compute import selection_flops, training_flops
from ..functional.evidence import flexibility_penalty, selected_fraction, simplicity_penalty
from ..report.record import RunRecord
from ..signals.batch import Signal
from ..trainer.kinds import KINDS
from .arguments import check_arguments, parse_arguments
from .train import Job, build_trainer, prepare, train
from .wrong_labels import FLIPPED, flip_labels

logger = logging.getLogger(__name__)

# What can be known of an example without any model.
MODEL_FREE = {Signal.LENGTH, Signal.TEXT, Signal.EXPLICIT_MARGIN}
# What a process says when a cell is over.
DONE = "dsel-cell-done"
# What of an evaluation differs between two runs of the same.
CLOCKED = ("runtime", "per_second")


@dataclass(frozen=True)
class Cell:
    """
    One training of an ablation.

    Attributes:
        kind (`str`):
            Kind of trainer.
        variant (`str`):
            Its name in the table: `stock`, `random keep=0.4`, or one of the methods'.
        selection (`list[dict]`):
            The methods; empty for stock TRL.
        seed (`int`):
            Seed of training and selection.
        flip (`float`, *optional*):
            Share of the training pairs whose label is turned; `None` leaves the data as it is.
        steps (`int`, *optional*):
            Optimizer steps; `None` = as the arguments say.
        config (`dict`):
            The other arguments, as a YAML file holds them.
        words (`list[str]`):
            Those that were given on the command line.
        metric (`str`):
            A key of the trainer's evaluation, or `module:function` of the trainer.
        data (`list[str]`):
            Hashes of the training and evaluation rows.
        threads (`int`):
            Threads of torch.
    """

    kind: str
    variant: str
    selection: list[dict[str, Any]]
    seed: int
    flip: float | None
    steps: int | None
    config: dict[str, Any]
    words: list[str]
    metric: str
    data: list[str]
    threads: int

    @property
    def name(self) -> str:
        """What it is called in lines for people."""
        flip = "" if self.flip is None else f", flip={self.flip:g}"
        return f"{self.variant}, seed {self.seed}{flip}"

    @property
    def folder_name(self) -> str:
        """Folder of its results: another training has another one."""
        told = json.dumps([asdict(self), versions()], sort_keys=True).encode()
        plain = "".join(char if char.isalnum() or char in "-=.," else "-" for char in self.variant)[:60]
        return f"{plain}-seed{self.seed}-{hashlib.sha256(told).hexdigest()[:10]}"


def run_cell(cell: Cell, folder: Path, shared: Path) -> dict[str, Any]:
    """
    Trains and evaluates one cell in `folder`, and writes what came of it into `folder/result.json`.

    Args:
        cell ([`Cell`]):
            What to train.
        folder (`Path`):
            Its own folder.
        shared (`Path`):
            Folder of the scores that cells share.

    Returns:
        `dict`: what is in that file.
    """
    torch.set_num_threads(cell.threads)
    with preserved_rng():
        # A reward model's head is drawn before its trainer seeds anything.
        set_seed(cell.seed)
        return _run(cell, folder, shared)


def _run(cell: Cell, folder: Path, shared: Path) -> dict[str, Any]:
    words = [*cell.words, "--output_dir", str(folder), "--seed", str(cell.seed), "--save_strategy", "no"]
    words += ["--report_to", "none", "--disable_tqdm", "true"]
    words += ["--selection", json.dumps(cell.selection)]
    words += [] if cell.steps is None else ["--max_steps", str(cell.steps)]
    # These two are of a selection, which stock TRL has not.
    left_out = () if cell.selection else ("log_by", "identical")
    config = {key: value for key, value in cell.config.items() if key not in left_out}
    arguments = parse_arguments(cell.kind, words, config)
    check_arguments(arguments)
    arguments.evaluates = True
    arguments.training.include_num_input_tokens_seen = "non_padding"
    job = prepare(arguments)
    if cell.flip is not None:
        job.train_dataset = flip_labels(job.train_dataset, cell.flip)
    trainer = build_trainer(job, arguments.training, cell.selection)
    selection = getattr(trainer, "selection", None)
    trainer.args.max_steps = cell.steps or planned_steps(trainer)
    before = _CostOfStart(selection)
    if selection is not None:
        selection.shared = shared
        trainer.add_callback(before)
    started = time.perf_counter()
    train(trainer)
    seconds = time.perf_counter() - started
    result = _outcome(cell, trainer, job, before.counts)
    if arguments.training.should_save:
        # What a clock says is no part of what a cell gives: it has a file of its own.
        added = 0.0 if selection is None else selection.costs.seconds
        write_json(folder / "seconds.json", {"seconds": round(seconds, 2), "selection_seconds": round(added, 3)})
        write_json(folder / "result.json", result)
    trainer.accelerator.wait_for_everyone()
    del trainer, selection
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return result


class _CostOfStart(TrainerCallback):
    """What selection has cost before the first step: it does not grow with their number."""

    def __init__(self, selection: Any) -> None:
        self.selection = selection
        self.counts: dict[str, int] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self.counts = dict(self.selection.costs.counts)


def planned_steps(trainer: Any) -> int:
    """Optimizer steps of a stock run with the trainer's arguments."""
    args = trainer.args
    if args.max_steps > 0:
        return int(args.max_steps)
    each = args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps
    return math.ceil(len(trainer.train_dataset) / each * args.num_train_epochs)


def _metric(metric: str, trainer: Any, found: Mapping[str, float]) -> float:
    """The value of the metric; raises `ValueError` for one that there is not."""
    if ":" in metric:
        module, name = metric.split(":", 1)
        return float(getattr(import_module(module), name)(trainer))
    if metric not in found:
        raise ValueError(f"metric={metric!r}: the evaluation gave {sorted(found)}.")
    return float(found[metric])


def _outcome(cell: Cell, trainer: Any, job: Job, at_start: Mapping[str, int]) -> dict[str, Any]:
    metrics = {
        key: float(value)
        for key, value in trainer.evaluate().items()
        if isinstance(value, int | float) and not any(word in key for word in CLOCKED)
    }
    selection, steps = getattr(trainer, "selection", None), int(trainer.state.global_step)
    tokens = int(trainer.state.num_input_tokens_seen)
    parameters = int(sum(p.numel() for p in trainer.accelerator.unwrap_model(trainer.model).parameters()))
    kind = KINDS[cell.kind]
    compute = {"adapter": hasattr(trainer.model, "peft_config"), "reference": kind.reference(trainer)}
    counts = {} if selection is None else {key: int(value) for key, value in selection.costs.counts.items() if value}
    result: dict[str, Any] = {
        "variant": cell.variant,
        "seed": cell.seed,
        "flip": cell.flip,
        "methods": cell.selection,
        "metric": _metric(cell.metric, trainer, metrics),
        "metrics": metrics,
        "steps": steps,
        "tokens": tokens,
        "training_flops": training_flops(parameters, tokens, **compute),
        "cost": dict(sorted(counts.items())),
        "selection_flops": _flops(parameters, counts),
        "selection_flops_at_start": _flops(parameters, at_start),
    }
    if selection is None:
        args = trainer.args
        seen = steps * args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps
        size = len(trainer.train_dataset) if isinstance(trainer.train_dataset, Dataset) else seen
        share = selected_fraction(min(seen, size), size)
        return {**result, "kept_fraction": 1.0, "selected_fraction": share, **_NO_EFFORT}
    summary = selection.metrics_window.summary(selection.ledger)
    result.update({key: summary[key] for key in ("kept_fraction", "selected_fraction")}, **_effort(selection))
    if trainer.args.should_save:
        result.update(_fate(job.train_dataset, RunRecord.read(Path(trainer.args.output_dir))))
    return result


def forward_tokens(counts: Mapping[str, int]) -> int:
    """Tokens through any model, of the counts of a run's costs."""
    return sum(counts.get(tokens, 0) for what, tokens in WORK.items() if not what.endswith("backwards"))


def backward_tokens(counts: Mapping[str, int]) -> int:
    """Tokens of backward passes beside the training, the policy's and the helpers'."""
    return sum(counts.get(tokens, 0) for what, tokens in WORK.items() if what.endswith("backwards"))


def _flops(parameters: int, counts: Mapping[str, int]) -> float:
    return selection_flops(parameters, forward_tokens(counts), backward_tokens(counts))


_NO_EFFORT = {"simplicity_penalty": 0.0, "flexibility_penalty": 0}


def _effort(selection: Any) -> dict[str, Any]:
    """A survey's penalties (hf.co/papers/2406.14115) for what a selection takes and is tied to."""
    methods = selection.methods.methods
    return {
        # Its steps are the hooks it acts in, and its code is this package's.
        "simplicity_penalty": simplicity_penalty(
            selection.costs.counts["helper_runs"],
            sum(len(method.hooks) for method in methods),
            public_code=True,
        ),
        "flexibility_penalty": flexibility_penalty(
            model_free=all(set(method.signals) <= MODEL_FREE for method in methods),
            dataset_free=not any(method.columns for method in methods),
            proprietary_free=True,
        ),
    }


def _fate(dataset: Any, record: RunRecord) -> dict[str, float]:
    """What a selection did with the pairs whose label is known to be turned."""
    if FLIPPED not in (dataset.column_names or []):
        return {}
    flipped = np.array(dataset[FLIPPED])[record.table["id"]].astype(bool)
    visits = record.visits.astype(np.float64)
    if not flipped.any() or flipped.all():
        return {}
    return {
        "flipped_dropped": float(record.dropped[flipped].mean()),
        "clean_dropped": float(record.dropped[~flipped].mean()),
        "flipped_share_of_training": float(visits[flipped].sum() / max(visits.sum(), 1.0)),
    }


# ---- The process that runs cells ----


def work(spec_file: Path) -> bool:
    """Runs the cell of a file; what goes wrong is written beside its result. Whether it went well."""
    spec = json.loads(spec_file.read_text(encoding="utf-8"))
    folder = Path(spec["folder"])
    cell = Cell(**spec["cell"])
    try:
        run_cell(cell, folder, Path(spec["shared"]))
    except Exception as error:
        cause = error.__cause__ or error
        logger.exception("%s failed.", cell.name)
        write_json(folder / "error.json", {"error": f"{type(cause).__name__}: {' '.join(str(cause).split())}"})
        return False
    (folder / "error.json").unlink(missing_ok=True)
    return True


def lines_of_parent() -> "queue.SimpleQueue[str]":
    """
    What the process that started this one sends by standard input, line by line, from now on. Once that process is
    gone, this one ends, in the middle of a cell too: nobody would read what it finds, and another may train the cell
    anew.
    """
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def listen() -> None:
        # Unbuffered: a thread that waits inside a buffer would keep the interpreter from ending.
        with open(0, "rb", buffering=0, closefd=False) as pipe:
            while line := pipe.readline():
                lines.put(line.decode().strip())
        os._exit(1)

    threading.Thread(target=listen, daemon=True).start()
    return lines


def main() -> int:
    """Runs the cell of the file that is named, or of those that come by standard input, one a line."""
    logging.basicConfig(format="dsel: %(message)s", level=logging.WARNING)
    if sys.argv[1:]:
        # Started by hand, there may be no pipe to listen to.
        if stat.S_ISFIFO(os.fstat(0).st_mode):
            lines_of_parent()
        return 0 if work(Path(sys.argv[1])) else 1
    lines = lines_of_parent()
    while True:
        work(Path(lines.get()))
        # Whoever has sent the line waits for one.
        sys.__stdout__.write(f"{DONE}\n")  # type: ignore[union-attr]
        sys.__stdout__.flush()  # type: ignore[union-attr]


if __name__ == "__main__":
    sys.exit(main())
