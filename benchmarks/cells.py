"""
Cells of a benchmark: each is one piece of work, done once by a process of its own and kept as a file.

A benchmark that was stopped goes on with the cells that are left; one that failed is named, and the others go on.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dsel_trl.data.files import write_json

Cell = tuple[Any, ...]
Work = Callable[..., dict[str, Any]]

# Two-sided 95% quantiles of Student's t by degrees of freedom; further on, that of the normal distribution.
T95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of a benchmark of cells."""
    parser.add_argument("--output", required=True, help="JSON file; finished cells lie in the folder of its name")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="cells at a time; default: the cores")
    parser.add_argument("--threads", type=int, default=1, help="of each of them")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one"
    )
    parser.add_argument("--report", action="store_true", help="only put the finished cells together")


def on_cpu(options: argparse.Namespace) -> bool:
    """Whether cells train on the CPU."""
    import torch

    return options.device == "cpu" or (options.device == "auto" and not torch.cuda.is_available())


def training(options: argparse.Namespace, folder: str, seed: int, **own: Any) -> dict[str, Any]:
    """Arguments of a trainer in float32 that keeps and says nothing, and `own` ones."""
    return {
        "output_dir": folder,
        "seed": seed,
        "bf16": False,
        "use_cpu": on_cpu(options),
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "model_init_kwargs": {"dtype": "float32"},
        **own,
    }


def demo_model(options: argparse.Namespace) -> str:
    """The folder of the demo model, which is built beside the cells once."""
    from dsel_trl.data.demo.model import build_demo_model

    return str(build_demo_model(Path(options.output).with_suffix("") / "model"))


def cell_path(options: argparse.Namespace, cell: Cell) -> Path:
    """The file of a finished cell."""
    name = "-".join(str(part) for part in cell)
    return Path(options.output).with_suffix("") / f"{name.replace(' ', '_').replace('/', '_')}.json"


def _one(work: Work, options: argparse.Namespace, cell: Cell) -> str:
    import datasets
    import torch

    datasets.disable_progress_bars()
    torch.set_num_threads(options.threads)
    started = time.perf_counter()
    try:
        found = work(options, *cell)
    except Exception as error:
        return f"{cell}: FAILED: {type(error).__name__}: {error}"
    seconds = round(time.perf_counter() - started, 1)
    where = "CPU" if on_cpu(options) else torch.cuda.get_device_name(0)
    write_json(cell_path(options, cell), {**found, "seconds": seconds, "where": where})
    shown = ", ".join(f"{key} {value:.4f}" for key, value in found.items() if isinstance(value, float))
    return f"{cell}: {shown} ({seconds:.0f} s)"


def run_cells(work: Work, cells: Sequence[Cell], options: argparse.Namespace) -> list[dict[str, Any]]:
    """
    Does what is left to do of `work(options, *cell)` and returns what came of all finished cells, in their order.

    Args:
        work (`Callable`):
            A function of a module, which gives JSON values.
        cells (`Sequence[tuple]`):
            Its arguments, cell by cell.
        options (`argparse.Namespace`):
            Those of [`add_options`], and the benchmark's own.
    """
    left = [cell for cell in cells if not cell_path(options, cell).is_file()]
    if left and not options.report:
        cell_path(options, left[0]).parent.mkdir(parents=True, exist_ok=True)
        quiet = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        os.environ |= {"OMP_NUM_THREADS": str(options.threads), **quiet}
        # Spawned: a process that has used a GPU or threads cannot be forked.
        with multiprocessing.get_context("spawn").Pool(options.workers, maxtasksperchild=8) as pool:
            for line in pool.imap_unordered(partial(_one, work, options), left):
                print(line, flush=True)
    paths = [cell_path(options, cell) for cell in cells]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]


def circumstances(options: argparse.Namespace, cells: Sequence[Cell], found: list[dict[str, Any]]) -> dict[str, Any]:
    """What a reader must know beside the figures: settings, where the cells ran, what they took, what is missing."""
    here = ("data", "model", "output", "stream", "folder", "workers", "threads", "device", "report")
    return {
        "settings": {key: value for key, value in vars(options).items() if key not in here},
        "where": sorted({row["where"] for row in found}),
        "seconds": round(sum(row["seconds"] for row in found)),
        "missing": len(cells) - len(found),
    }


def interval(values: Sequence[float]) -> float:
    """Half of the 95% interval of a mean, by Student's t; NaN for one value."""
    if len(values) < 2:
        return float("nan")
    return T95.get(len(values) - 1, 1.96) * statistics.stdev(values) / len(values) ** 0.5


def averages(rows: Sequence[dict[str, Any]], keys: Sequence[str]) -> dict[str, float]:
    """Of each key the mean over some rows, and as `<key>_interval` half of its 95% interval."""
    found: dict[str, float] = {}
    for key in keys:
        values = [row[key] for row in rows]
        found |= {key: statistics.mean(values), f"{key}_interval": interval(values)}
    return found
