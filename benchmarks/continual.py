"""
What is forgotten of a stream of tasks: Adapt-infinity, sequential training and random replay at equal trained tokens.

Each cell (a method and a seed) is `dsel sft` from the shell over the stages of one parquet file with the columns
`task`, `task_index`, `split`, `prompt` and `completion`; every stage ends with the loss on the held-out rows of all
stages so far. A stage ends with the step that reaches its tokens, the same ones for every method, and the learning
rate is constant: what is equal is what was trained, to within a batch. A cell that is done is not run again, and one
that was cut off goes on from its last checkpoint.

    python -m benchmarks.continual --stream FILE --model MODEL --output continual.json --workers 8
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer

from benchmarks.cells import add_options, averages, circumstances, interval, on_cpu, run_cells
from dsel_trl.data.files import replacing, write_json

# What of the earlier stages comes again, and the methods.
REPLAY = "random replay"
METHODS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "sequential": ("0", []),
    REPLAY: ("1", []),
    "random pool": ("all", []),
    "adapt_inf": ("all", [{"name": "adapt_inf"}]),
}


def runs_of(options: argparse.Namespace) -> Path:
    """Where the data of the stages and the runs are kept."""
    return Path(options.output).resolve().with_suffix("") / "runs"


def write_stages(options: argparse.Namespace) -> None:
    """Writes train and test file of each task, in order, and the block `stages:` with the tokens of each."""
    runs = runs_of(options)
    rows = Dataset.from_parquet(options.stream, keep_in_memory=True)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    places, tasks, splits = rows["task_index"][:], rows["task"][:], rows["split"][:]
    entries = []
    for _, task in sorted(set(zip(places, tasks, strict=True)))[: options.tasks]:
        where = runs / "data" / task
        for name, most in (("train", options.rows), ("test", options.test_rows)):
            own = [i for i, found in enumerate(zip(tasks, splits, strict=True)) if found == (task, name)][:most]
            part = rows.select(own).select_columns(["prompt", "completion"])
            if name == "train":
                texts = [row["prompt"] + row["completion"] for row in part]
                lengths = [min(len(ids), options.max_length) for ids in tokenizer(texts)["input_ids"]]
                tokens = round(options.steps * options.batch * statistics.mean(lengths))
                entries.append({"name": task, "dataset_name": str(where), "max_tokens": tokens})
            with replacing(where / f"{name}.parquet") as temporary:
                part.to_parquet(str(temporary))
    # Where short rows are drawn, so many tokens take more steps.
    write_json(runs / "stages.json", [{**entry, "max_steps": 8 * options.steps} for entry in entries])


def measure(options: argparse.Namespace, method: str, seed: int) -> dict[str, Any]:
    """One stream from the shell, begun or gone on with, and its forgetting table."""
    replay, selection = METHODS[method]
    if selection:
        own = {"budget": options.rows, "survive": options.survive, "features": "gradients"}
        selection = [{**selection[0], **own}]
    runs = runs_of(options)
    output = runs / f"{method.replace(' ', '-')}-{seed}"
    arguments = {
        "model_name_or_path": options.model,
        "output_dir": output,
        "stages": (runs / "stages.json").read_text(encoding="utf-8"),
        "replay": replay,
        "per_device_train_batch_size": options.batch,
        "per_device_eval_batch_size": 32,
        "max_length": options.max_length,
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": "constant",
        "dtype": "float32",
        "bf16": "false",
        "seed": seed,
        "logging_steps": 1_000,
        "save_steps": 25,
        "save_total_limit": 1,
        "report_to": "none",
        "use_cpu": str(on_cpu(options)).lower(),
        "gradient_checkpointing": "false",
        "disable_tqdm": "true",
    }
    command = [sys.executable, "-m", "dsel_trl", "sft", *(str(w) for k, v in arguments.items() for w in (f"--{k}", v))]
    if selection:
        command += ["--selection", json.dumps(selection)]
    if list(output.glob("stage-*")):
        command += ["--resume_from_checkpoint", "true"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        raise RuntimeError(f"exit {done.returncode}\n{done.stderr[-2000:]}")
    summary = json.loads((output / "selection" / "summary.json").read_text(encoding="utf-8"))
    counted = ("forwards", "backwards")
    return {
        "method": method,
        "seed": seed,
        "final": summary["loss"]["final_mean"],
        "forgetting": summary["loss"]["forgetting"],
        "loss": summary["loss"],
        "accuracy": summary.get("accuracy"),
        "steps": sum(stage["steps"] for stage in summary["stages"]),
        "tokens": [stage["tokens"] for stage in summary["stages"]],
        **{key: summary["cost"].get(key, 0) for key in counted},
    }


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per method: final loss and forgetting, and both less those of random replay, seed by seed."""
    by_cell = {(row["method"], row["seed"]): row for row in rows}
    table = []
    for method in METHODS:
        own = [row for row in rows if row["method"] == method]
        if not own:
            continue
        line: dict[str, Any] = {"method": method, "seeds": [row["seed"] for row in own]}
        line |= averages(own, ("final", "forgetting"))
        for key in ("final", "forgetting"):
            pairs = [(row, by_cell.get((REPLAY, row["seed"]))) for row in own]
            apart = [one[key] - other[key] for one, other in pairs if other is not None]
            if apart and method != REPLAY:
                line |= {f"{key}_apart": statistics.mean(apart), f"{key}_apart_interval": interval(apart)}
        line["tokens"] = statistics.mean(sum(row["tokens"]) for row in own)
        line |= {key: statistics.mean(row[key] for row in own) for key in ("steps", "forwards", "backwards")}
        table.append(line)
    return table


def verdict(table: list[dict[str, Any]]) -> list[str]:
    """What the table says of Adapt-infinity, in words, whatever it is."""
    found = {row["method"]: row for row in table}
    if "adapt_inf" not in found:
        return []
    own, lines = found["adapt_inf"], []

    def below(other: str, key: str) -> bool:
        """Whether it is so beyond the intervals; seed by seed where the table has that."""
        if other == REPLAY:
            return own[f"{key}_apart"] + own[f"{key}_apart_interval"] < 0
        return own[key] + own[f"{key}_interval"] < found[other][key] - found[other][f"{key}_interval"]

    for other in ("sequential", REPLAY):
        if other in found:
            less, lower = below(other, "forgetting"), below(other, "final")
            lines.append(
                f"adapt_inf forgets {'less' if less else 'no less'} than {other} and ends "
                f"{'lower' if lower else 'no lower'}."
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stream", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--tasks", type=int, default=6, help="stages, from the first on")
    parser.add_argument("--rows", type=int, default=200, help="training rows per stage")
    parser.add_argument("--test-rows", type=int, default=50)
    parser.add_argument("--steps", type=int, default=50, help="per stage, of rows of the new task")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--survive", type=int, default=400, help="adapt_inf: rows left for later stages")
    add_options(parser)
    options = parser.parse_args()
    if not options.report:
        write_stages(options)
    cells = [(method, seed) for seed in options.seeds for method in options.methods]
    rows = run_cells(measure, cells, options)
    table = summary(rows)
    lines = verdict(table)
    write_json(
        Path(options.output), {**circumstances(options, cells, rows), "table": table, "verdict": lines, "cells": rows}
    )
    print(f"{'method':<16}{'final loss':>18}{'forgetting':>20}{'tokens':>12}{'steps':>8}")
    for row in table:
        print(
            f"{row['method']:<16}{row['final']:>10.4f} ±{row['final_interval']:.4f}"
            f"{row['forgetting']:>+12.4f} ±{row['forgetting_interval']:.4f}{row['tokens']:>12,.0f}{row['steps']:>8.0f}"
        )
    print("\n".join(lines))


if __name__ == "__main__":
    main()
