"""
What each preference method does to flipped labels: their share among what it drops, or the weight it gives them.

The demo corpus has 30% flipped training labels; only this script knows which. A method that chooses is judged by the
share of flipped pairs among those it left out, a method that weighs by the mean weight of flipped and of clean pairs
and by the share of flipped ones among its lowest-weighted 30%. The last column says what that is against a random
choice of as many pairs of the same corpora. Methods are not tuned; they differ in what they know (`uses`: the noisy
score columns, or the model alone), and not all of them are meant for label noise. Two tables:

- `settings`: one setting per method, at which a run of 48 steps of the demo model learns (float32, a rate of 1e-3);
- `defaults`: every method and TRL at their defaults (bf16, a rate of 1e-6, helpers with LoRA), over 2,048 pairs for 8
  epochs: 2,048 steps for a method that keeps all pairs; the table says how many each row took.

A cell is one table, row and seed. Each is a file of its own in the folder `OUTPUT.cells`, and one that is there is not
run again: a run that was stopped goes on, and several machines may share the work by `--only`. `--workers` cells run
at once, each a process with one thread, on the GPU where there is one, or dealt out over several.

    python benchmarks/recovery.py --tables settings defaults --seeds 3 --workers 8 --output recovery.json
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import datasets
import numpy as np
import torch
import transformers
from transformers import PrinterCallback
from trl import DPOConfig, DPOTrainer

from dsel_trl import Method, SelectionCallback, create_method
from dsel_trl.data.demo.corpus import demo_preferences
from dsel_trl.data.demo.model import build_demo_model

KEEP = 0.7
HELPER = {"helper_lora": False}
FULL = {**HELPER, "helper_epochs": 2.0}
# Row of the table: method, parameters, whether it chooses or weighs, and what it knows.
RUNS: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "random": ("random", {"keep": KEEP}, "drops", "nothing"),
    "margin: explicit": ("margin", {"source": "explicit", "keep": KEEP}, "drops", "scores"),
    "margin: implicit": ("margin", {"source": "implicit", "keep": KEEP}, "drops", "model"),
    "margin: disagreement": (
        "margin",
        {"source": "disagreement", "action": "keep_bottom", "keep": KEEP},
        "drops",
        "both",
    ),
    "alignment_potential: simpo": ("alignment_potential", {"keep": KEEP}, "drops", "both"),
    "alignment_potential: dpo": ("alignment_potential", {"keep": KEEP, "form": "dpo"}, "drops", "both"),
    "bees: scores + helper": ("bees", {"keep": KEEP, **FULL}, "drops", "both"),
    "bees: helper": ("bees", {"keep": KEEP, "sources": ["helper"], **FULL}, "drops", "model"),
    "bees: scores + policy": (
        "bees",
        {"keep": KEEP, "sources": ["explicit", "implicit"], "refresh": "epoch"},
        "drops",
        "both",
    ),
    "selective_dpo: cross_fit": ("selective_dpo", {"keep": KEEP, **FULL}, "drops", "model"),
    "selective_dpo: online": ("selective_dpo", {"keep": KEEP, "source": "online"}, "drops", "model"),
    "curry_dpo": ("curry_dpo", {}, "drops", "scores"),
    "filtered_dpo": ("filtered_dpo", {"max_new_tokens": 16}, "drops", "scores"),
    "rho_loss": ("rho_loss", {"factor": 2, **FULL}, "drops", "model"),
    "jest": ("jest", {"clean_column": "score_chosen", "clean_above": 7.0, "factor": 2, **HELPER}, "drops", "both"),
    "select_k_of_b: loss": ("select_k_of_b", {"factor": 2}, "drops", "model"),
    "s2l": ("s2l", {"keep": KEEP, "clusters": 20, "checkpoints": 4, **HELPER}, "drops", "model"),
    "infobatch": ("infobatch", {}, "drops", "model"),
    "length_curriculum: keep": ("length_curriculum", {"action": "keep_top", "keep": KEEP}, "drops", "lengths"),
    "bees: weight": ("bees", {"action": "weight", **FULL}, "weighs", "both"),
    "robust_dpo": ("robust_dpo", {"eps": 0.3}, "weighs", "model"),
    "dr_dpo": ("dr_dpo", {"beta_prime": 0.5}, "weighs", "model"),
    "beta_dpo": ("beta_dpo", {}, "weighs", "model"),
    "wpo": ("wpo", {}, "weighs", "model"),
    "uni_dpo": ("uni_dpo", {}, "weighs", "both"),
    "alpha_dpo": ("alpha_dpo", {}, "weighs", "model"),
    "gamma_po": ("gamma_po", {"form": "dpo", "tau": 0.5}, "weighs", "model"),
    "amapo": ("amapo", {}, "weighs", "model"),
}


# At the defaults: only what a method cannot do without. A second row of a method is another source of its scores.
DEFAULTS: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "random": ("random", {}, "drops", "nothing"),
    "margin": ("margin", {}, "drops", "model"),
    "margin: explicit": ("margin", {"source": "explicit"}, "drops", "scores"),
    "margin: disagreement": ("margin", {"source": "disagreement", "action": "keep_bottom"}, "drops", "both"),
    "alignment_potential": ("alignment_potential", {}, "drops", "both"),
    "alignment_potential: dpo": ("alignment_potential", {"form": "dpo", "refresh": "epoch"}, "drops", "both"),
    "bees": ("bees", {}, "drops", "both"),
    "bees: helper": ("bees", {"sources": ["helper"]}, "drops", "model"),
    "selective_dpo": ("selective_dpo", {}, "drops", "model"),
    "selective_dpo: online": ("selective_dpo", {"source": "online"}, "drops", "model"),
    "curry_dpo": ("curry_dpo", {}, "drops", "scores"),
    "filtered_dpo": ("filtered_dpo", {"max_new_tokens": 16}, "drops", "scores"),
    "rho_loss": ("rho_loss", {}, "drops", "model"),
    "jest": ("jest", {"clean_column": "score_chosen", "clean_above": 7.0}, "drops", "both"),
    "select_k_of_b": ("select_k_of_b", {}, "drops", "model"),
    "s2l": ("s2l", {}, "drops", "model"),
    "infobatch": ("infobatch", {}, "drops", "model"),
    "alignment_potential: weight": ("alignment_potential", {"action": "weight"}, "weighs", "both"),
    "bees: weight": ("bees", {"action": "weight"}, "weighs", "both"),
    "robust_dpo": ("robust_dpo", {}, "weighs", "model"),
    "dr_dpo": ("dr_dpo", {}, "weighs", "model"),
    "beta_dpo": ("beta_dpo", {}, "weighs", "model"),
    "wpo": ("wpo", {}, "weighs", "model"),
    "uni_dpo": ("uni_dpo", {}, "weighs", "both"),
    "alpha_dpo": ("alpha_dpo", {}, "weighs", "model"),
    "gamma_po": ("gamma_po", {}, "weighs", "model"),
    "amapo": ("amapo", {}, "weighs", "model"),
}
TABLES = {"settings": RUNS, "defaults": DEFAULTS}
# Pairs, epochs, and what the trainer is given beside its defaults.
SIZES = {"settings": (384, 2), "defaults": (2048, 8)}
TRAINER: dict[str, dict[str, Any]] = {
    "settings": {"per_device_train_batch_size": 16, "learning_rate": 1e-3, "beta": 0.3, "bf16": False},
    "defaults": {},
}
# Methods that do not plan, but pick their examples out of larger batches: what they never took counts as dropped.
PICKING = ("rho_loss", "select_k_of_b", "jest")
LOWEST = 0.3


# Methods that make other rows of the pairs: they neither leave a pair out nor weigh it.
REBUILDING = ("inco_dpo", "reward_augmented")


class MeanWeight(Method):
    """Mean weight of each example over the second half of the run, when the model knows something."""

    name = "mean_weight"

    def setup(self, run: Any) -> None:
        self.sums, self.counts = np.zeros(run.size), np.zeros(run.size)

    def observe(self, run: Any, step: Any) -> None:
        if run.progress > 0.5 and "weight" in step.values:
            np.add.at(self.sums, step.ids, step.values["weight"])
            np.add.at(self.counts, step.ids, 1.0)


def judge(rows: datasets.Dataset) -> Any:
    """The noisy judge as a reward: a known response has its score, any other the mean of its prompt's two."""
    known: dict[tuple[str, str], float] = {}
    mean: dict[str, float] = {}
    for row in rows:
        prompt = row["prompt"][-1]["content"]
        mean[prompt] = (row["score_chosen"] + row["score_rejected"]) / 2
        for side in ("chosen", "rejected"):
            known[prompt, row[side][-1]["content"]] = row[f"score_{side}"]

    def reward(prompts: list[Any], responses: list[str]) -> list[float]:
        texts = [(prompt[-1]["content"], text.strip()) for prompt, text in zip(prompts, responses, strict=True)]
        return [known.get(key, mean[key[0]]) for key in texts]

    return reward


def run(table: str, name: str, seed: int, model: Path, pairs: int, epochs: int) -> dict[str, float]:
    """One cell: a training with one method; what became of the flipped pairs."""
    rows = demo_preferences(seed, train_size=pairs, test_size=8)["train"]
    flipped = np.array(rows["truth_flipped"])
    rows = rows.remove_columns([column for column in rows.column_names if column.startswith("truth_")])
    method_name, parameters, kind, _ = TABLES[table][name]
    if method_name == "filtered_dpo":
        parameters = {**parameters, "reward": judge(rows)}
    with tempfile.TemporaryDirectory() as folder:
        args = DPOConfig(
            folder,
            **TRAINER[table],
            num_train_epochs=epochs,
            max_length=128,
            use_cpu=not torch.cuda.is_available(),
            seed=seed,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        torch.manual_seed(seed)
        trainer = DPOTrainer(str(model), args=args, train_dataset=rows)
        trainer.remove_callback(PrinterCallback)
        weights = MeanWeight()
        callback = SelectionCallback(trainer, [create_method(method_name, **parameters), weights])
        trainer.train()
    found = {"steps": float(trainer.state.global_step), "flipped": float(flipped.mean()), "pairs": float(len(rows))}
    if kind == "drops":
        dropped = callback.ledger.visits == 0 if method_name in PICKING else callback.ledger.dropped
        return found | {
            "dropped": float(dropped.mean()),
            "flipped_among_dropped": float(flipped[dropped].mean()) if dropped.any() else float("nan"),
            "flipped_among_kept": float(flipped[~dropped].mean()),
        }
    seen = weights.counts > 0
    mean = weights.sums[seen] / weights.counts[seen]
    # Equal weights say nothing: which of them are the lowest is then drawn.
    order = np.lexsort([np.random.default_rng(seed).random(len(mean)), mean])
    return found | {
        "weight_flipped": float(mean[flipped[seen]].mean()),
        "weight_clean": float(mean[~flipped[seen]].mean()),
        "flipped_among_lowest": float(flipped[seen][order[: round(LOWEST * len(mean))]].mean()),
    }


def cell(job: dict[str, Any]) -> dict[str, Any]:
    """Runs one cell in this process and keeps it in its file; gives what the file says."""
    if job["gpu"] is not None:
        # Before anything asks for a GPU: the trainer takes all that it sees.
        os.environ["CUDA_VISIBLE_DEVICES"] = job["gpu"]
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    start, file = time.monotonic(), Path(job["file"])
    result = run(job["table"], job["name"], job["seed"], Path(job["model"]), job["pairs"], job["epochs"])
    settings = {key: job[key] for key in ("table", "name", "seed", "pairs", "epochs")}
    written = {**settings, "seconds": round(time.monotonic() - start, 1), "result": result}
    temporary = file.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(written, indent=1), encoding="utf-8")
    temporary.replace(file)
    return written


def verdict(cells: list[dict[str, float]], key: str) -> str:
    """What the flipped share of a choice is against a random choice of as many pairs of the same corpora."""
    sizes = [c["pairs"] * (c.get("dropped", LOWEST)) for c in cells]
    if not all(sizes):
        return "drops nothing" if not any(sizes) else "drops nothing with some seeds"
    chance = [
        c["flipped"] * (1 - c["flipped"]) / size * (c["pairs"] - size) / (c["pairs"] - 1)
        for c, size in zip(cells, sizes, strict=True)
    ]
    if not sum(chance):
        return "drops everything"
    better = sum(c[key] - c["flipped"] for c in cells) / np.sqrt(sum(chance))
    if better < -2:
        return "worse than random"
    return "no better than random" if better < 2 else "not clearly better" if better < 3 else "better"


def markdown(table: str, found: dict[str, list[dict[str, float]]]) -> str:
    """The results of one table in Markdown, best rows first: mean over the seeds, and half of their spread."""

    def number(cells: list[dict[str, float]], key: str) -> str:
        values = [c[key] for c in cells if np.isfinite(c[key])]
        return f"{np.mean(values):.3f} ± {np.ptp(values) / 2:.3f}" if values else "-"

    heads = {
        "drops": ("dropped", "flipped_among_dropped", "flipped_among_kept"),
        "weighs": ("weight_flipped", "weight_clean", "flipped_among_lowest"),
    }
    judged = {"drops": "flipped_among_dropped", "weighs": "flipped_among_lowest"}
    lines = []
    for kind, keys in heads.items():
        names = [name for name in found if TABLES[table][name][2] == kind]
        names.sort(key=lambda name: -np.nan_to_num(np.mean([c[judged[kind]] for c in found[name]])))
        lines += [f"| method | uses | steps | {' | '.join(k.replace('_', ' ') for k in keys)} | against chance |"]
        lines += ["|" + "---|" * (len(keys) + 4)]
        for name in names:
            cells = found[name]
            values = " | ".join(number(cells, key) for key in keys)
            steps = f"{np.mean([c['steps'] for c in cells]):.0f}"
            lines.append(
                f"| `{name}` | {TABLES[table][name][3]} | {steps} | {values} | {verdict(cells, judged[kind])} |"
            )
        lines.append("")
    return "\n".join([*lines, f"Neither drop nor weigh, but rebuild the pairs: {', '.join(REBUILDING)}."])


def jobs_of(options: argparse.Namespace, model: Path) -> list[dict[str, Any]]:
    """The cells that were asked for, each with the file that keeps it."""
    folder = Path(f"{options.output}.cells")
    jobs = []
    for table in options.tables:
        pairs, epochs = (
            given or own for given, own in zip((options.pairs, options.epochs), SIZES[table], strict=True)
        )
        for name in options.only or TABLES[table]:
            if name not in TABLES[table]:
                continue
            for seed in range(options.seeds):
                stem = f"{table}-{name.replace(': ', '-').replace(' ', '_')}-{pairs}x{epochs}-{seed}.json"
                job = {"table": table, "name": name, "seed": seed, "pairs": pairs, "epochs": epochs}
                jobs.append({**job, "model": str(model), "file": str(folder / stem)})
    folder.mkdir(parents=True, exist_ok=True)
    return jobs


def work(jobs: list[dict[str, Any]], workers: int) -> list[str]:
    """Runs the cells that have no file yet; gives what failed."""
    missing, failed = [job for job in jobs if not Path(job["file"]).is_file()], []
    gpus = torch.cuda.device_count()
    for number, job in enumerate(missing):
        job["gpu"] = str(number % gpus) if gpus > 1 else None
    # A process that has used a GPU cannot be forked.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, max_tasks_per_child=1) as pool:
        waiting = {pool.submit(cell, job): job for job in missing}
        for number, future in enumerate(as_completed(waiting), 1):
            job = waiting[future]
            label = f"[{number}/{len(missing)}] {job['table']} {job['name']} seed {job['seed']}"
            try:
                done = future.result()
                print(f"{label}: {done['seconds']:.0f} s {done['result']}", flush=True)
            except Exception:
                failed.append(label)
                print(f"{label} FAILED\n{traceback.format_exc()}", flush=True)
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="*", choices=list(TABLES), default=["settings"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=None, help="default 384, and 2048 at the defaults")
    parser.add_argument("--epochs", type=int, default=None, help="default 2, and 8 at the defaults")
    parser.add_argument("--only", nargs="*", default=None, help="rows of the tables; default all")
    parser.add_argument("--workers", type=int, default=1, help="cells at once")
    parser.add_argument("--model", default=str(Path(tempfile.gettempdir()) / "dsel_demo_model"))
    parser.add_argument("--output", default="recovery.json")
    options = parser.parse_args()
    jobs = jobs_of(options, build_demo_model(options.model))
    failed = work(jobs, options.workers)
    cells = [json.loads(Path(job["file"]).read_text()) for job in jobs if Path(job["file"]).is_file()]
    Path(options.output).write_text(json.dumps({"cells": cells, "failed": failed}, indent=1), encoding="utf-8")
    for table in options.tables:
        found: dict[str, list[dict[str, float]]] = {}
        for one in cells:
            if one["table"] == table:
                found.setdefault(one["name"], []).append(one["result"])
        if found:
            print(f"\n{table}: {options.seeds} seeds; mean and half of the spread.\n\n{markdown(table, found)}")
    if failed:
        raise SystemExit(f"{len(failed)} cells failed: {failed}")


if __name__ == "__main__":
    main()
