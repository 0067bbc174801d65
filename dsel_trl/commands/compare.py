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
from ..functional.evidence import (
    dense_rank,
    efficiency,
    feasibility_ranks,
    flexibility_penalty,
    improvement_ratio,
    selected_fraction,
    simplicity_penalty,
)
from ..signals.batch import Signal
from ..trainer.kinds import KINDS
from .train import Job, build_trainer, selection_files, train

logger = logging.getLogger(__name__)

FLIPPED = "truth_flipped"
# What can be known of an example without any model.
MODEL_FREE = {Signal.LENGTH, Signal.TEXT, Signal.EXPLICIT_MARGIN}


def _examples_per_step(args: Any) -> int:
    return int(args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps)


def _planned_steps(trainer: Any) -> int:
    """Optimizer steps of the stock run: what every run of the comparison takes."""
    args = trainer.args
    if args.max_steps > 0:
        return int(args.max_steps)
    return math.ceil(len(trainer.train_dataset) / _examples_per_step(args) * args.num_train_epochs)


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
        result.update(_effort(trainer.selection))
    else:
        seen = size = steps * _examples_per_step(training)
        # Of a stream everything that came was trained on.
        if isinstance(trainer.train_dataset, Dataset):
            size = len(trainer.train_dataset)
        result.update(_NO_EFFORT, selected_fraction=selected_fraction(min(seen, size), size))
    del trainer
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return result, steps


_NO_EFFORT = {"simplicity_penalty": 0.0, "flexibility_penalty": 0}


def _effort(selection: Any) -> dict[str, Any]:
    """How much of the data a selection trained on, and a survey's penalties for what it takes and is tied to."""
    methods = selection.methods.methods
    summary = selection.metrics_window.summary(selection.ledger)
    return {
        "selected_fraction": summary["selected_fraction"],
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


def _survey(results: list[dict[str, Any]], kind: str) -> None:
    """Adds the measures of a survey (hf.co/papers/2406.14115, section 5) by which selections are compared."""
    penalties = ([result[f"{name}_penalty"] for result in results] for name in ("simplicity", "flexibility"))
    for result, rank in zip(results, feasibility_ranks(*penalties)[2].tolist(), strict=True):
        result["feasibility_rank"] = rank
    measure = KINDS[kind].measure.key.removeprefix("eval_")
    stock = next((result[measure] for result in results if result["run"] == "stock"), None)
    if stock is None:
        return
    # A loss is better where it is smaller.
    pairs = [(stock, result[measure]) if measure == "loss" else (result[measure], stock) for result in results]
    if not all(below for _, below in pairs):
        return
    ratios = [improvement_ratio([above], [below]) for above, below in pairs]
    heights = efficiency([result["selected_fraction"] for result in results], ratios)
    ranks = dense_rank(heights, descending=True).tolist()
    for result, ratio, height, rank in zip(results, ratios, heights.tolist(), ranks, strict=True):
        result.update(improvement_ratio=ratio, efficiency=height, efficiency_rank=rank)


def compare(job: Job) -> dict[str, Any]:
    """
    Trains every run of `compare:` from the same model with the same seed for the same number of steps.

    Args:
        job ([`~launch.Job`]):
            Data and model, with an evaluation set.

    Returns:
        `dict`: what is also in `output_dir/comparison.json`: seed, steps, and per run its held-out measure, seconds,
        what selection added (`cost`), a survey's measures (hf.co/papers/2406.14115: the share of the data used, the
        improvement over stock, efficiency and feasibility) and, where the training data has the column
        `truth_flipped`, what became of the flipped pairs.
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
    _survey(results, arguments.kind)
    comparison = {"trainer": arguments.kind, "seed": arguments.training.seed, "steps": steps, "runs": results}
    if arguments.training.should_save:
        write_json(Path(arguments.training.output_dir) / "comparison.json", comparison)
    return comparison


def format_table(comparison: dict[str, Any]) -> str:
    """The comparison as text, one line per run."""
    measure = KINDS[comparison["trainer"]].measure
    fate = ["flipped dropped", "clean dropped", "flipped in training"]
    rows = [["run", measure.name, *fate, "data used", "of stock", "steps", "added forwards", "seconds"]]
    for result in comparison["runs"]:
        shares = [result.get(key) for key in ("flipped_dropped", "clean_dropped", "flipped_share_of_training")]
        rows.append(
            [
                result["run"],
                measure.form.format(result[measure.key.removeprefix("eval_")]),
                *("-" if share is None else f"{share:.1%}" for share in shares),
                f"{result['selected_fraction']:.1%}",
                f"{result['improvement_ratio']:.2f}" if "improvement_ratio" in result else "-",
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
