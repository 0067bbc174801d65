"""The same training several times, stock and with selection, and a table of what came out."""

import copy
import gc
import json
import logging
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from ..core.costs import all_forwards
from ..data.files import write_json
from ..trainer.kinds import KINDS
from .train import Job, build_trainer, selection_files, train

logger = logging.getLogger(__name__)

FLIPPED = "truth_flipped"


def _planned_steps(trainer: Any) -> int:
    """Optimizer steps of the stock run: what every run of the comparison takes."""
    args = trainer.args
    if args.max_steps > 0:
        return int(args.max_steps)
    per_step = args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps
    return math.ceil(len(trainer.train_dataset) / per_step * args.num_train_epochs)


def _arguments(training: Any, run: str) -> Any:
    # A shallow copy: constructing the configuration again would undo what its first construction settled.
    changed = copy.copy(training)
    changed.output_dir = str(Path(training.output_dir) / run)
    changed.run_name = f"{training.run_name}-{run}" if training.run_name else run
    return changed


def _summary(output_dir: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output_dir / "selection" / "summary.json").read_text(encoding="utf-8"))
    return found


def _ledger(output_dir: Path) -> dict[str, np.ndarray]:
    rows = Dataset.from_parquet(str(output_dir / "selection" / "ledger.parquet"), keep_in_memory=True)
    dropped = np.array([bool(reason) for reason in rows["dropped_by"]])
    return {"id": np.array(rows["id"]), "visits": np.array(rows["visits"]), "dropped": dropped}


def _fate_of_flipped(dataset: Any, ledger: dict[str, np.ndarray]) -> dict[str, float]:
    """What a selection did with the pairs whose label is known to be flipped."""
    if FLIPPED not in (dataset.column_names or []):
        return {}
    flipped = np.array(dataset[FLIPPED])[ledger["id"]]
    visits = ledger["visits"].astype(np.float64)
    return {
        "flipped_dropped": float(ledger["dropped"][flipped].mean()),
        "clean_dropped": float(ledger["dropped"][~flipped].mean()),
        "flipped_share_of_training": float(visits[flipped].sum() / max(visits.sum(), 1.0)),
    }


def _run_one(job: Job, run: str, selection: list[dict[str, Any]], steps: int | None) -> tuple[dict[str, Any], int]:
    arguments = job.arguments
    training = _arguments(arguments.training, run)
    if steps is not None:
        training.max_steps = steps
    # What the methods cannot work with must show before the first run, not after it.
    trainer = build_trainer(job, training, selection if steps else arguments.selection)
    if steps is None:
        steps = _planned_steps(trainer)
        trainer.args.max_steps = steps
        if not selection and arguments.selection:
            trainer.selection.detach()
    logger.info("Comparing: run %r, %d steps.", run, steps)
    started = time.perf_counter()
    train(trainer)
    seconds = time.perf_counter() - started
    metrics = trainer.evaluate()
    measure = KINDS[arguments.kind].measure.key
    result: dict[str, Any] = {
        "run": run,
        "methods": selection,
        measure.removeprefix("eval_"): metrics[measure],
        "steps": int(trainer.state.global_step),
        "seconds": round(seconds, 1),
    }
    if training.save_strategy != "no":
        trainer.save_model(training.output_dir)
    trainer.accelerator.wait_for_everyone()
    if selection:
        result.update(_fate_of_flipped(job.train_dataset, _ledger(Path(training.output_dir))))
        result["cost"] = _summary(Path(training.output_dir))["cost"]
    del trainer
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return result, steps


def compare(job: Job) -> dict[str, Any]:
    """
    Trains every run of `compare:` from the same model with the same seed for the same number of steps.

    Args:
        job ([`~launch.Job`]):
            Data and model, with an evaluation set.

    Returns:
        `dict`: what is also in `output_dir/comparison.json`: seed, steps, and per run its held-out measure, seconds,
        what selection added (`cost`) and, where the training data has the column `truth_flipped`, what became of the
        flipped pairs.
    """
    arguments = job.arguments
    # `random` keeps as much as `selection` did, so it comes last.
    runs = sorted(arguments.compare, key=lambda run: run == "random")
    results: list[dict[str, Any]] = []
    steps: int | None = None
    for run in runs:
        selection = arguments.selection if run == "selection" else []
        if run == "random":
            kept = _summary(Path(arguments.training.output_dir) / "selection")["kept_fraction"]
            if kept >= 1:
                logger.info("The selection drops nothing, so there is no random choice to compare it with.")
                continue
            selection = [{"name": "random", "keep": kept}]
        result, steps = _run_one(job, run, selection, steps)
        results.append(result)
    comparison = {"trainer": arguments.kind, "seed": arguments.training.seed, "steps": steps, "runs": results}
    if arguments.training.should_save:
        write_json(Path(arguments.training.output_dir) / "comparison.json", comparison)
    return comparison


def format_table(comparison: dict[str, Any]) -> str:
    """The comparison as text, one line per run."""
    measure = KINDS[comparison["trainer"]].measure
    fate = ["flipped dropped", "clean dropped", "flipped in training"]
    rows = [["run", measure.name, *fate, "steps", "added forwards", "seconds"]]
    for result in comparison["runs"]:
        shares = [result.get(key) for key in ("flipped_dropped", "clean_dropped", "flipped_share_of_training")]
        rows.append(
            [
                result["run"],
                measure.form.format(result[measure.key.removeprefix("eval_")]),
                *("-" if share is None else f"{share:.1%}" for share in shares),
                str(result["steps"]),
                str(all_forwards(result.get("cost", {}))),
                f"{result['seconds']:.0f}",
            ]
        )
    if not any(cell != "-" for row in rows[1:] for cell in row[2:5]):
        rows = [row[:2] + row[5:] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def run_comparison(job: Job) -> str:
    """Compares, and returns the table with the places of the ledger and the picture."""
    comparison = compare(job)
    output_dir = Path(job.arguments.training.output_dir)
    lines = ["", format_table(comparison), ""]
    if "selection" in job.arguments.compare:
        lines += selection_files(output_dir / "selection")
    return "\n".join([*lines, f"Table: {output_dir / 'comparison.json'}"])
