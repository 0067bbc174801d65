"""
What is forgotten of a stream of tasks: Adapt-infinity, sequential training and random replay at equal trained tokens.

Each cell (a method and a seed) is `dsel sft` from the shell over the stages of one parquet file with the columns
`task`, `task_index`, `split`, `prompt` and `completion`; every stage ends with the loss on the held-out rows of all
stages so far. The steps of a stage are such that every method trains as many tokens in it, as far as the mean length
of what it may draw from says; the tokens that were really trained are printed beside. A cell that is done is not run
again, and one that was cut off goes on from its last checkpoint.

    python benchmarks/continual.py --stream STREAM.parquet --model MODEL --seeds 0 1 2 --workers 8
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from datasets import Dataset
from transformers import AutoTokenizer

from dsel_trl.data.files import replacing, write_json

# Two-sided 95% quantiles of Student's t by degrees of freedom; further on, that of the normal distribution.
T95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}

# What of the earlier stages comes again, and the methods.
METHODS = {
    "sequential": ("0", []),
    "random replay": ("1", []),
    "random pool": ("all", []),
    "adapt_inf": ("all", [{"name": "adapt_inf"}]),
}


def split(options: argparse.Namespace, folder: Path) -> list[dict]:
    """Writes train and test file of each task, in order; gives name, folder and mean tokens of each."""
    rows = Dataset.from_parquet(options.stream, keep_in_memory=True)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    order = sorted({(row["task_index"], row["task"]) for row in rows.select_columns(["task_index", "task"])})
    stages = []
    for _, task in order[: options.tasks]:
        where = folder / "data" / task
        for name in ("train", "test"):
            part = rows.filter(lambda row, task=task, name=name: row["task"] == task and row["split"] == name)
            part = part.select(range(min(len(part), options.rows if name == "train" else options.test_rows)))
            if name == "train":
                texts = [row["prompt"] + row["completion"] for row in part]
                lengths = [min(len(ids), options.max_length) for ids in tokenizer(texts)["input_ids"]]
                stages.append({"name": task, "dataset_name": str(where), "tokens": statistics.mean(lengths)})
            with replacing(where / f"{name}.parquet") as temporary:
                part.select_columns(["prompt", "completion"]).to_parquet(str(temporary))
    return stages


def planned(stages: list[dict], replay: str, options: argparse.Namespace) -> list[dict]:
    """The block `stages:`, with the steps of each."""
    entries = []
    for k, stage in enumerate(stages):
        earlier = [before["tokens"] for before in stages[:k]]
        drawn = stage["tokens"]
        if earlier and replay == "all":
            drawn = statistics.mean([*earlier, stage["tokens"]])
        elif earlier and replay != "0":
            drawn = statistics.mean([statistics.mean(earlier), stage["tokens"]])
        steps = max(1, round(options.steps * stage["tokens"] / drawn))
        entries.append({"name": stage["name"], "dataset_name": stage["dataset_name"], "max_steps": steps})
    return entries


def run(cell: tuple[str, int], stages: list[dict], options: argparse.Namespace, folder: Path) -> dict:
    method, seed = cell
    replay, selection = METHODS[method]
    if selection:
        own = {"budget": options.rows, "survive": options.survive, "directions": options.directions}
        selection = [{**selection[0], **own}]
    output = folder / f"{method.replace(' ', '-')}-{seed}"
    kept = output / "cell.json"
    if kept.is_file():
        return json.loads(kept.read_text())
    arguments = {
        "model_name_or_path": options.model,
        "output_dir": output,
        "stages": json.dumps(planned(stages, replay, options)),
        "replay": replay,
        "per_device_train_batch_size": options.batch,
        "per_device_eval_batch_size": 32,
        "max_length": options.max_length,
        "learning_rate": options.learning_rate,
        "seed": seed,
        "logging_steps": 1,
        "save_steps": 25,
        "save_total_limit": 1,
        "report_to": "none",
        "use_cpu": "true",
        "gradient_checkpointing": "false",
        "disable_tqdm": "true",
    }
    command = [sys.executable, "-m", "dsel_trl", "sft", *(str(w) for k, v in arguments.items() for w in (f"--{k}", v))]
    if selection:
        command += ["--selection", json.dumps(selection)]
    if list(output.glob("stage-*")):
        command += ["--resume_from_checkpoint", "true"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{method}, seed {seed}: exit {done.returncode}\n{done.stderr[-2000:]}")
    summary = json.loads((output / "selection" / "summary.json").read_text())
    result = {
        "method": method,
        "seed": seed,
        "seconds": round(time.perf_counter() - started, 1),
        "loss": summary["loss"],
        "accuracy": summary.get("accuracy"),
        "steps": sum(stage["steps"] for stage in summary["stages"]),
        "tokens": sum(trained_tokens(path) for path in output.glob("stage-*")),
        "forwards": summary["cost"].get("forwards", 0),
    }
    write_json(kept, result)
    return result


def trained_tokens(stage: Path) -> int:
    """Tokens that a stage has gone through, as TRL counts them, from its last checkpoint."""
    last = max(stage.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    history = json.loads((last / "trainer_state.json").read_text())["log_history"]
    return int(max(row["num_tokens"] for row in history if "num_tokens" in row))


def interval(values: list[float]) -> float:
    """Half of the 95% interval of a mean; NaN for one value."""
    if len(values) < 2:
        return float("nan")
    return T95.get(len(values) - 1, 1.96) * statistics.stdev(values) / len(values) ** 0.5


def table(results: list[dict]) -> str:
    """A line per method: final loss, forgetting, and the difference to random replay, paired by seed."""
    lines = ["| method | seeds | final loss | forgetting | final loss - random replay | tokens | steps | forwards |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    by_cell = {(r["method"], r["seed"]): r for r in results}
    for method in METHODS:
        own = [r for r in results if r["method"] == method]
        if not own:
            continue
        final, lost = ([r["loss"][key] for r in own] for key in ("final_mean", "forgetting"))
        pairs = [(r, by_cell.get(("random replay", r["seed"]))) for r in own]
        apart = [a["loss"]["final_mean"] - b["loss"]["final_mean"] for a, b in pairs if b is not None]
        difference = "-"
        if apart and method != "random replay":
            difference = f"{statistics.mean(apart):+.4f} ± {interval(apart):.4f}"
        lines.append(
            f"| {method} | {len(own)} | {statistics.mean(final):.4f} ± {interval(final):.4f} | "
            f"{statistics.mean(lost):+.4f} ± {interval(lost):.4f} | {difference} | "
            f"{statistics.mean(r['tokens'] for r in own):,.0f} | {statistics.mean(r['steps'] for r in own):.0f} | "
            f"{statistics.mean(r['forwards'] for r in own):,.0f} |"
        )
    return "\n".join(lines)


def verdict(results: list[dict]) -> list[str]:
    """What the table says of Adapt-infinity, in words, whatever it is."""
    means = {}
    for method in METHODS:
        own = [r for r in results if r["method"] == method]
        if own:
            means[method] = {k: statistics.mean(r["loss"][k] for r in own) for k in ("final_mean", "forgetting")}
    if "adapt_inf" not in means:
        return []
    lines = []
    for other, key, what in (("sequential", "forgetting", "forgets"), ("random replay", "final_mean", "ends")):
        if other in means:
            less = means["adapt_inf"][key] < means[other][key]
            word = {"forgets": ("less", "no less"), "ends": ("lower", "no lower")}[what][0 if less else 1]
            lines.append(f"adapt_inf {what} {word} than {other}.")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stream", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--tasks", type=int, default=10, help="stages, from the first on")
    parser.add_argument("--rows", type=int, default=300, help="training rows per stage")
    parser.add_argument("--test-rows", type=int, default=100)
    parser.add_argument("--steps", type=int, default=75, help="steps per stage of sequential training")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--survive", type=int, default=600, help="adapt_inf: rows left for later stages")
    parser.add_argument("--directions", type=int, default=32, help="adapt_inf: random directions")
    parser.add_argument("--workers", type=int, default=1, help="cells at a time, each on one core")
    parser.add_argument("--folder", type=Path, default=Path("outputs/continual"), help="where the runs are kept")
    parser.add_argument("--output", type=Path, default=Path("continual.json"))
    options = parser.parse_args()
    folder = options.folder.resolve()
    stages = split(options, folder)
    cells = [(method, seed) for seed in options.seeds for method in options.methods]
    with ThreadPoolExecutor(options.workers) as pool:
        results = []
        for result in pool.map(lambda cell: run(cell, stages, options, folder), cells):
            results.append(result)
            print(f"{result['method']}, seed {result['seed']}: {result['loss']['final_mean']:.4f}", flush=True)
    print("\n" + table(results) + "\n\n" + "\n".join(verdict(results)))
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    write_json(options.output, {"settings": settings, "results": results})


if __name__ == "__main__":
    main()
