"""
What each preference method does to flipped labels: their share among what it drops, or the weight it gives them.

The demo corpus has 30% flipped training labels; only this script knows which. A method that chooses is judged by the
share of flipped pairs among those it left out, a method that weighs by the mean weight of flipped and of clean pairs
and by the share of flipped ones among its lowest-weighted 30%. `random` shows what chance gives. Methods are run with
one setting each, not tuned; they differ in what they know (`uses`: the noisy score columns, or the model alone), and
not all of them are meant for label noise. Prints a table and writes JSON.

    python benchmarks/recovery.py --seeds 3 --output recovery.json
"""

import argparse
import json
import os
import tempfile
import time
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


def run(name: str, seed: int, model: Path, folder: str, pairs: int, epochs: int) -> dict[str, float]:
    """One training with one method; what became of the flipped pairs."""
    rows = demo_preferences(seed, train_size=pairs, test_size=8)["train"]
    flipped = np.array(rows["truth_flipped"])
    rows = rows.remove_columns([column for column in rows.column_names if column.startswith("truth_")])
    method_name, parameters, kind, _ = RUNS[name]
    if method_name == "filtered_dpo":
        parameters = {**parameters, "reward": judge(rows)}
    args = DPOConfig(
        folder,
        per_device_train_batch_size=16,
        num_train_epochs=epochs,
        learning_rate=1e-3,
        beta=0.3,
        max_length=128,
        bf16=False,
        use_cpu=True,
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
    if kind == "drops":
        picks = method_name in ("rho_loss", "select_k_of_b", "jest")
        dropped = callback.ledger.visits == 0 if picks else callback.ledger.dropped
        if not dropped.any():
            return {"dropped": 0.0, "flipped_among_dropped": float("nan"), "flipped_among_kept": float(flipped.mean())}
        return {
            "dropped": float(dropped.mean()),
            "flipped_among_dropped": float(flipped[dropped].mean()),
            "flipped_among_kept": float(flipped[~dropped].mean()),
        }
    seen = weights.counts > 0
    mean = weights.sums[seen] / weights.counts[seen]
    lowest = np.argsort(mean, kind="stable")[: round(0.3 * len(mean))]
    return {
        "weight_flipped": float(mean[flipped[seen]].mean()),
        "weight_clean": float(mean[~flipped[seen]].mean()),
        "flipped_among_lowest": float(flipped[seen][lowest].mean()),
    }


def summary(results: list[dict[str, float]]) -> dict[str, list[float]]:
    """Mean and spread (largest minus smallest) over the seeds."""
    return {
        key: [float(np.mean([r[key] for r in results])), float(np.ptp([r[key] for r in results]))]
        for key in results[0]
    }


def table(found: dict[str, dict[str, list[float]]]) -> str:
    def cell(value: list[float]) -> str:
        return f"{value[0]:6.3f} ±{value[1] / 2:5.3f}"

    lines = [f"{'chooses':28} {'uses':8} {'dropped':>14} {'flipped/dropped':>16} {'flipped/kept':>14}"]
    for name, row in found.items():
        if "dropped" in row:
            cells = [cell(row[key]) for key in ("dropped", "flipped_among_dropped", "flipped_among_kept")]
            lines.append(f"{name:28} {RUNS[name][3]:8} {cells[0]:>14} {cells[1]:>16} {cells[2]:>14}")
    lines += ["", f"{'weighs':28} {'uses':8} {'weight flipped':>14} {'weight clean':>16} {'flipped/lowest':>14}"]
    for name, row in found.items():
        if "weight_clean" in row:
            cells = [cell(row[key]) for key in ("weight_flipped", "weight_clean", "flipped_among_lowest")]
            lines.append(f"{name:28} {RUNS[name][3]:8} {cells[0]:>14} {cells[1]:>16} {cells[2]:>14}")
    lines += ["", f"Neither drop nor weigh, but rebuild the pairs: {', '.join(REBUILDING)}."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=384)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=list(RUNS), help="rows of the table")
    parser.add_argument("--model", default=str(Path(tempfile.gettempdir()) / "dsel_demo_model"))
    parser.add_argument("--output", default="recovery.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    model = build_demo_model(options.model)
    found: dict[str, dict[str, list[float]]] = {}
    raw: dict[str, list[dict[str, float]]] = {}
    for name in options.only:
        start = time.monotonic()
        raw[name] = []
        for seed in range(options.seeds):
            with tempfile.TemporaryDirectory() as folder:
                raw[name].append(run(name, seed, model, folder, options.pairs, options.epochs))
        found[name] = summary(raw[name])
        print(f"{name}: {time.monotonic() - start:.0f} s {found[name]}", flush=True)
        settings = {key: getattr(options, key) for key in ("seeds", "pairs", "epochs")}
        text = json.dumps({"settings": settings, "summary": found, "runs": raw}, indent=1)
        Path(options.output).write_text(text, encoding="utf-8")
    print(f"\n{options.seeds} seeds, {options.pairs} pairs; mean and half of the spread. About 0.3 are flipped.\n")
    print(table(found))


if __name__ == "__main__":
    main()
