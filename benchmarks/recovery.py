"""
What each preference method does to flipped labels: their share among what it drops, or the weight it gives them.

The demo corpus has 30% flipped training labels; only this script knows which. A method that chooses is judged by the
share of flipped pairs among those it left out, a method that weighs by the mean weight of flipped and of clean pairs
and by the share of flipped ones among its lowest-weighted 30%. The last column says what that is against a random
choice of as many pairs of the same corpora. Methods are not tuned; they differ in what they know (`uses`: the noisy
score columns, or the model alone), and not all of them are meant for label noise. Two tables:

- `settings`: one setting per method, at which a run of 48 steps of the demo model learns (float32, a rate of 1e-3);
- `defaults`: every method and TRL at their defaults (bf16, a rate of 1e-6, helpers with LoRA), over 1,024 pairs for 8
  epochs: 1,024 steps for a method that keeps all pairs; the table says how many each row took.

A cell is one table, row and seed, a process with one thread, on the GPU where there is one.

    python -m benchmarks.recovery --tables settings defaults --seeds 3 --workers 8 --output recovery.json
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from transformers import PrinterCallback
from trl import DPOConfig, DPOTrainer

from benchmarks.cells import add_options, circumstances, demo_model, run_cells, training
from benchmarks.tables import RECOVERED
from dsel_trl import Method, SelectionCallback, create_method
from dsel_trl.data.demo.corpus import demo_preferences
from dsel_trl.data.files import write_json

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
SIZES = {"settings": (384, 2), "defaults": (1024, 8)}
TRAINER: dict[str, dict[str, Any]] = {
    "settings": {"per_device_train_batch_size": 16, "learning_rate": 1e-3, "beta": 0.3},
    # Without gradient checkpointing, which changes the time alone.
    "defaults": {"bf16": True},
}
# Methods that do not plan, but pick their examples out of larger batches: what they never took counts as dropped.
PICKING = ("rho_loss", "select_k_of_b", "jest")
# Drops other pairs in every epoch, and none in the last.
ANEW = ("infobatch",)
LOWEST = 0.3
# By what methods that choose and those that weigh are judged.
JUDGED = {"drops": "flipped_among_dropped", "weighs": "flipped_among_lowest"}


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


def run(options: argparse.Namespace, table: str, name: str, size: str, seed: int) -> dict[str, Any]:
    """One cell: a training with one method; what became of the flipped pairs."""
    pairs, epochs = map(int, size.split("x"))
    rows = demo_preferences(seed, train_size=pairs, test_size=8)["train"]
    flipped = np.array(rows["truth_flipped"])
    rows = rows.remove_columns([column for column in rows.column_names if column.startswith("truth_")])
    method_name, parameters, kind, _ = TABLES[table][name]
    if method_name == "filtered_dpo":
        parameters = {**parameters, "reward": judge(rows)}
    with tempfile.TemporaryDirectory() as folder:
        how = training(options, folder, seed, num_train_epochs=epochs, max_length=128)
        args = DPOConfig(**{**how, **TRAINER[table]})
        torch.manual_seed(seed)
        trainer = DPOTrainer(demo_model(options), args=args, train_dataset=rows)
        trainer.remove_callback(PrinterCallback)
        weights = MeanWeight()
        callback = SelectionCallback(trainer, [create_method(method_name, **parameters), weights])
        trainer.train()
    found = {"table": table, "name": name, "seed": seed, "steps": float(trainer.state.global_step)}
    found |= {"flipped": float(flipped.mean()), "pairs": float(len(rows))}
    if kind == "drops":
        out = left_out(callback.ledger, method_name, epochs)
        return found | {
            "dropped": float(out.mean()),
            "flipped_among_dropped": float(np.average(flipped, weights=out)) if out.any() else float("nan"),
            "flipped_among_kept": float(np.average(flipped, weights=1 - out)),
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


def left_out(ledger: Any, method: str, epochs: int) -> np.ndarray:
    """Share of the epochs that each pair was left out of; of most methods the last choice, which is 0 or 1."""
    if method in ANEW:
        return 1 - np.minimum(ledger.visits / epochs, 1)
    return (ledger.visits == 0 if method in PICKING else ledger.dropped).astype(float)


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


def summary(table: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per method, best first, those that choose before those that weigh: mean over seeds, half of the spread."""
    found = []
    for kind, keys in RECOVERED.items():
        judged = JUDGED[kind]
        lines = []
        for name in [name for name in TABLES[table] if TABLES[table][name][2] == kind]:
            cells = [row for row in rows if (row["table"], row["name"]) == (table, name)]
            if not cells:
                continue
            line = {"name": name, "kind": kind, "uses": TABLES[table][name][3], "seeds": [c["seed"] for c in cells]}
            line |= {"steps": float(np.mean([c["steps"] for c in cells])), "verdict": verdict(cells, judged)}
            for key in keys:
                values = [c[key] for c in cells if np.isfinite(c[key])]
                line[key] = [float(np.mean(values)), float(np.ptp(values) / 2)] if values else None
            lines.append(line)
        found += sorted(lines, key=lambda line: -(line[judged] or [0.0])[0])
    return found


def cells(options: argparse.Namespace) -> list[tuple[str, str, str, int]]:
    found = []
    for table in options.tables:
        pairs, epochs = options.size or SIZES[table]
        names = [name for name in TABLES[table] if not options.only or name in options.only]
        found += [(table, name, f"{pairs}x{epochs}", seed) for seed in range(options.seeds) for name in names]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", choices=list(TABLES), default=["settings"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--size", type=int, nargs=2, help="pairs and epochs; default 384 2, at the defaults 1024 8")
    parser.add_argument("--only", nargs="*", default=None, help="rows of the tables; default all")
    add_options(parser)
    options = parser.parse_args()
    demo_model(options)
    wanted = cells(options)
    rows = run_cells(run, wanted, options)
    tables = {table: summary(table, rows) for table in options.tables}
    write_json(Path(options.output), {**circumstances(options, wanted, rows), "tables": tables})
    for table, found in tables.items():
        print(f"\n{table}: {options.seeds} seeds; mean and half of the spread.")
        for row in found:
            values = "  ".join(
                f"{key} {row[key][0]:.3f} ± {row[key][1]:.3f}" for key in RECOVERED[row["kind"]] if row[key]
            )
            print(f"{row['name']:<28}{row['steps']:>6.0f} steps  {values}  {row['verdict']}")


if __name__ == "__main__":
    main()
