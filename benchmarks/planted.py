"""
Planted truth: preference pairs whose labels are right by construction, of which a share is flipped.

Chosen is the response of an instruction (40 to 300 characters); rejected is, half the time each, the response to
another prompt, or the same response with half of its words shuffled. For each seed and share of flips: how well the
audit finds them, and what each recipe makes of the noisy pairs at equal optimizer steps, beside a training on clean
labels and the stock one. Cells that are finished are skipped, so a run that was stopped goes on.

    python -m benchmarks.planted --data DATA --model MODEL --output planted.json --workers 4
    python -m benchmarks.planted --data DATA --model MODEL --output planted.json --report

DATA holds sft_alpaca_{train,validation,test}.parquet. The recipe is chosen on the seeds of `--choose`, and reported on
those of `--seeds`.
"""

import argparse
import statistics
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from benchmarks.cells import add_options, cell_path, circumstances, run_cells, training
from dsel_trl.data.files import write_json

SHORTEST, LONGEST = 40, 300
PAIRS = 1400
RATES = (0.0, 0.2, 0.4)
# Clean pairs for the methods that follow a target; no test pair is among them.
TRUSTED = 64
# What is done about the noisy labels; all take as many optimizer steps as `stock`.
RECIPES: dict[str, list[dict[str, Any]] | None] = {
    "audit_soft": [{"name": "audit"}],
    "stock": None,
    "audit_flip": [{"name": "audit", "action": "flip", "flip_above": 0.5}],
    "audit_keep_60": [{"name": "audit", "action": "keep_top", "keep": 0.6}],
    "audit_keep_40": [{"name": "audit", "action": "keep_top", "keep": 0.4}],
    "audit_weight": [{"name": "audit", "action": "weight"}],
    "robust_dpo": [{"name": "robust_dpo", "eps": 0.3}],
    "random_60": [{"name": "random", "keep": 0.6}],
    "margin_60": [{"name": "margin", "keep": 0.6}],
    "inrun_shapley_60": [{"name": "inrun_shapley", "keep": 0.6}],
    "selective_dpo_60": [{"name": "selective_dpo", "keep": 0.6}],
}


def read(data: Path, split: str) -> list[tuple[str, str]]:
    rows = Dataset.from_parquet(str(data / f"sft_alpaca_{split}.parquet"), keep_in_memory=True)
    pairs = zip(rows["prompt"], rows["completion"], strict=True)
    return [(prompt, response) for prompt, response in pairs if SHORTEST <= len(response) <= LONGEST]


def shuffled(text: str, rng: np.random.Generator) -> str:
    """The text with half of its words in each other's places."""
    words = text.split()
    places = rng.choice(len(words), len(words) // 2, replace=False)
    for place, word in zip(places, [words[i] for i in rng.permutation(places)], strict=True):
        words[place] = word
    return " ".join(words)


def planted(rows: list[tuple[str, str]], size: int, rng: np.random.Generator, rate: float) -> Dataset:
    """`size` pairs, of which exactly a share `rate` is flipped (`truth_flipped`)."""
    made = []
    for i in rng.permutation(len(rows))[:size].tolist():
        prompt, chosen = rows[i]
        other = int(rng.integers(len(rows) - 1))
        swapped = bool(rng.random() < 0.5)
        rejected = rows[other + (other >= i)][1] if swapped else shuffled(chosen, rng)
        made.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "truth_kind": int(swapped)})
    for place in rng.permutation(len(made))[: round(rate * len(made))].tolist():
        made[place]["chosen"], made[place]["rejected"] = made[place]["rejected"], made[place]["chosen"]
        made[place]["truth_flipped"] = 1
    return Dataset.from_list([{"truth_flipped": 0, **row} for row in made])


def sets(options: argparse.Namespace, seed: int, rate: float) -> tuple[Dataset, Dataset, Dataset]:
    """
    Training pairs of a seed, the same but for their flips at every rate, and test pairs and trusted ones, the same for
    all.
    """
    data = Path(options.data)
    held_out = read(data, "test") + read(data, "validation")
    train = planted(read(data, "train"), options.pairs, np.random.default_rng([seed, 1]), rate)
    clean = planted(held_out, options.test_pairs + TRUSTED, np.random.default_rng(2), 0.0)
    test, trusted = clean.select(range(options.test_pairs)), clean.select(range(options.test_pairs, len(clean)))
    return train, test, trusted.select_columns(["prompt", "chosen", "rejected"])


def train_cell(options: argparse.Namespace, recipe: str, rate: float, seed: int) -> dict[str, Any]:
    """Held-out accuracy of one training, and for an audit how well it found the flips."""
    from trl import DPOConfig, DPOTrainer

    from dsel_trl import SelectionCallback, create_method, get_method_card

    train, test, trusted = sets(options, seed, rate)
    train = train.add_column("place", range(len(train)))
    steps = options.pairs // 8
    with tempfile.TemporaryDirectory() as folder:
        trainer = DPOTrainer(
            options.model,
            args=DPOConfig(
                **training(options, folder, seed),
                beta=0.1,
                learning_rate=3e-4,
                per_device_train_batch_size=8,
                per_device_eval_batch_size=32,
                max_steps=steps,
                max_length=256,
            ),
            train_dataset=train,
            eval_dataset=test,
        )
        callback = None
        if RECIPES.get(recipe) is not None:
            methods = []
            for entry in RECIPES[recipe]:
                parameters = {key: value for key, value in entry.items() if key != "name"}
                if any(one.name == "target" for one in get_method_card(entry["name"]).parameters):
                    parameters["target"] = trusted
                methods.append(create_method(entry["name"], **parameters))
            callback = SelectionCallback(trainer, methods)
            # All recipes of an audit use the same one.
            callback.shared = cell_path(options, ("audit", rate, seed)).with_suffix("")
            trainer.add_callback(callback)
        trainer.train()
        found = {"accuracy": trainer.evaluate()["eval_rewards/accuracies"], "steps": trainer.state.global_step}
        if callback is not None and recipe.startswith("audit") and rate > 0:
            # The trainer leaves out pairs of which nothing is left to train.
            places = callback.run.column("place").astype(int)
            flipped = np.array(train["truth_flipped"], dtype=bool)[places]
            found |= graded(1.0 - np.asarray(callback.ledger["audit"], dtype=float), flipped)
    return {"recipe": recipe, "rate": rate, "seed": seed, **found}


def graded(wrong: np.ndarray, flipped: np.ndarray) -> dict[str, float]:
    """How well probabilities of a wrong label find the flips."""
    from dsel_trl.functional.audit.label_noise import area_under_curve, expected_calibration_error

    return {
        "auroc": area_under_curve(wrong, flipped),
        "calibration_error_truth": expected_calibration_error(wrong, flipped),
        "right_after_flips": float(np.mean(flipped == (wrong >= 0.6))),
    }


def cells(options: argparse.Namespace) -> list[tuple[str, float, int]]:
    # The seeds inside: recipes that share an audit should not all begin at once.
    seeds = [*options.choose, *options.seeds]
    wanted = [(recipe, rate, seed) for recipe in options.recipes for rate in options.rates for seed in seeds]
    if 0.0 not in options.rates:
        # The ceiling.
        wanted += [("stock", 0.0, seed) for seed in seeds]
    return wanted


def interval(values: list[float], draws: int = 10_000) -> tuple[float, float]:
    """Bootstrap interval of the mean, 95%."""
    rng = np.random.default_rng(0)
    means = rng.choice(values, (draws, len(values))).mean(axis=1)
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def report(options: argparse.Namespace, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the reported seeds, the recovered share of what the flips cost, and the recipe that was chosen."""
    done = {(row["recipe"], row["rate"], row["seed"]): row for row in rows}
    found: dict[str, Any] = {"table": [], "chosen": {}}

    def of(recipe: str, rate: float, seeds: list[int], key: str) -> list[float]:
        return [done[recipe, rate, s][key] for s in seeds if key in done.get((recipe, rate, s), {})]

    for rate in [rate for rate in options.rates if rate > 0]:
        tried = {r: of(r, rate, options.choose, "accuracy") for r in options.recipes}
        tried = {r: statistics.mean(v) for r, v in tried.items() if len(v) == len(options.choose) and v}
        if tried:
            found["chosen"][f"{rate:g}"] = max(tried, key=lambda r: tried[r])
    for rate in options.rates:
        for recipe in options.recipes:
            seeds = [s for s in options.seeds if (recipe, rate, s) in done]
            if not seeds:
                continue
            accuracies = of(recipe, rate, seeds, "accuracy")
            row: dict[str, Any] = {"recipe": recipe, "rate": rate, "seeds": seeds}
            row |= {"accuracy": statistics.mean(accuracies), "accuracies": accuracies}
            both = [s for s in seeds if ("stock", rate, s) in done and ("stock", 0.0, s) in done]
            if rate > 0 and both:
                gains = [
                    a - b
                    for a, b in zip(
                        of(recipe, rate, both, "accuracy"), of("stock", rate, both, "accuracy"), strict=True
                    )
                ]
                costs = [
                    a - b
                    for a, b in zip(
                        of("stock", 0.0, both, "accuracy"), of("stock", rate, both, "accuracy"), strict=True
                    )
                ]
                row |= {"recovered": sum(gains) / sum(costs), "cost": statistics.mean(costs)}
                # Of the ratio: seeds are drawn together for what was gained and what was lost.
                rng = np.random.default_rng(0)
                drawn = rng.integers(len(both), size=(10_000, len(both)))
                ratios = np.array(gains)[drawn].sum(axis=1) / np.array(costs)[drawn].sum(axis=1)
                row["recovered_interval"] = [float(np.quantile(ratios, q)) for q in (0.025, 0.975)]
            for key in ("auroc", "calibration_error_truth", "right_after_flips"):
                values = of(recipe, rate, seeds, key)
                if values:
                    row[key], row[f"{key}_interval"] = statistics.mean(values), interval(values)
            found["table"].append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[2, 3, 4, 5, 6], help="reported")
    parser.add_argument("--choose", type=int, nargs="*", default=[0, 1], help="on which the recipe is chosen")
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES))
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--test-pairs", type=int, default=900)
    add_options(parser)
    options = parser.parse_args()
    wanted = cells(options)
    rows = run_cells(train_cell, wanted, options)
    found = report(options, rows) | circumstances(options, wanted, rows)
    found["versions"] = {name: version(name) for name in ("torch", "transformers", "trl", "scikit-learn")}
    write_json(Path(options.output), found)
    print(f"{'recipe':<16}{'flips':>7}{'accuracy':>10}{'recovered':>22}{'AUROC':>8}{'right':>8}")
    for row in found["table"]:
        low, high = row.get("recovered_interval", (float("nan"),) * 2)
        recovered = f"{row.get('recovered', float('nan')):.2f} [{low:.2f}, {high:.2f}]"
        tail = f"{row.get('auroc', float('nan')):>8.3f}{row.get('right_after_flips', float('nan')):>8.3f}"
        print(f"{row['recipe']:<16}{row['rate']:>7.0%}{row['accuracy']:>10.3f}{recovered:>22}{tail}")
    print(f"chosen on seeds {options.choose}: {found['chosen']}; cells missing: {found['missing']}")


if __name__ == "__main__":
    main()
