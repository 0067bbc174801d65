"""
Does a trusted set of refusals find the unsafe answers of a mixture?

Trains a small model on a mixture of benign rows, refusals and unsafe stubs, with each method steered by the same
trusted set: the refusals of the validation file. Says how well the method's scores tell the unsafe rows from the rest
(AUROC: 1 = all of them have lower scores), and which share of the 20% with the lowest scores is unsafe, beside the
share in the mixture. Labels are for judging only: no method sees them. Each method and seed is a process of its own;
finished ones are skipped.

    python -m benchmarks.safety --data FOLDER --model MODEL --output safety.json --workers 8
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from benchmarks.cells import add_options, averages, circumstances, run_cells, training
from dsel_trl.data.files import write_json
from dsel_trl.functional.audit.label_noise import area_under_curve
from dsel_trl.functional.ranking import bottom_k, keep_count

UNSAFE, TRUSTED = "unsafe_stub", "safe_refusal"
DROPPED = 0.2
RANDOM = "random"
# Method, parameters, and passes over the data; 0 for those that measure before the first step.
METHODS: dict[str, tuple[str, dict[str, Any], int]] = {
    "seal": ("seal", {"burn_in": 2}, 2),
    "seal, u from 0.5": ("seal", {"burn_in": 2, "upper": 0.5}, 2),
    "seal, value": ("seal", {"burn_in": 2, "value": "helper", "helper_lora": False}, 2),
    "seal, Adam": ("seal", {"burn_in": 2, "update": "adam"}, 2),
    "inrun_shapley": ("inrun_shapley", {"target_size": 32, "target_refresh": 5, "keep": 1.0}, 2),
    "gotd": ("gotd", {}, 0),
    "knn_shapley": ("knn_shapley", {}, 0),
    "cosine_relevance": ("cosine_relevance", {}, 0),
    RANDOM: ("random", {"refresh": "never"}, 0),
}


def auroc(scores: np.ndarray, low: np.ndarray) -> float:
    """Probability that a row of `low` has a lower score than another row; equal ones count half."""
    return area_under_curve(-scores, low)


def measure(options: argparse.Namespace, name: str, seed: int) -> dict[str, Any]:
    """One run of one method: its AUROC, and the unsafe share of what it ranks lowest."""
    from trl import SFTConfig, SFTTrainer

    from dsel_trl import SelectionCallback

    train, trusted = (
        Dataset.from_parquet(str(Path(options.data) / f"safety_mixture_{split}.parquet"), keep_in_memory=True)
        for split in ("train", "validation")
    )
    train = train.shuffle(seed=seed).select(range(min(options.rows, len(train))))
    columns = ["prompt", "completion"]
    trusted = trusted.select(np.flatnonzero(np.array(trusted["label"][:]) == TRUSTED)).select_columns(columns)
    method, parameters, passes = METHODS[name]
    with tempfile.TemporaryDirectory() as output:
        trainer = SFTTrainer(
            options.model,
            args=SFTConfig(
                **training(options, output, seed),
                num_train_epochs=max(1, passes),
                max_steps=-1 if passes else 1,
                per_device_train_batch_size=options.batch,
                learning_rate=options.learning_rate,
                lr_scheduler_type="constant",
                max_length=256,
            ),
            train_dataset=train.select_columns(columns).add_column("place", range(len(train))),
        )
        chosen = {"keep": 1 - DROPPED, **({} if name == RANDOM else {"target": trusted}), **parameters}
        callback = SelectionCallback(trainer, method, **chosen)
        trainer.add_callback(callback)
        trainer.train()
        # The trainer leaves out rows without a trained token.
        unsafe = np.array(train["label"][:])[callback.run.column("place").astype(int)] == UNSAFE
        if name == RANDOM:
            scores = np.random.default_rng([seed, 9]).random(len(unsafe))
        else:
            scores = callback.ledger[method].astype(np.float64)
    lowest = bottom_k(scores, keep_count(DROPPED, len(scores)))
    return {
        "method": name,
        "seed": seed,
        "auroc": auroc(scores, unsafe),
        "unsafe_of_dropped": float(unsafe[lowest].mean()),
        "unsafe_of_all": float(unsafe.mean()),
    }


def summary(rows: list[dict[str, Any]], names: list[str]) -> list[dict[str, Any]]:
    """A row per method: mean over the seeds and half of its 95% interval."""
    table = []
    for name in names:
        own = [row for row in rows if row["method"] == name]
        if own:
            line: dict[str, Any] = {"method": name, "seeds": [row["seed"] for row in own]}
            table.append(line | averages(own, ("auroc", "unsafe_of_dropped", "unsafe_of_all")))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with safety_mixture_train and _validation.parquet")
    parser.add_argument("--model", required=True)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[2, 3, 4, 5, 6])
    parser.add_argument("--rows", type=int, default=1200, help="training rows drawn by the seed")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    add_options(parser)
    options = parser.parse_args()
    cells = [(name, seed) for seed in options.seeds for name in options.methods]
    rows = run_cells(measure, cells, options)
    table = summary(rows, options.methods)
    write_json(Path(options.output), {**circumstances(options, cells, rows), "table": table})
    print(f"{'method':<20}{'AUROC':>16}{'unsafe of dropped':>22}{'unsafe of all':>16}")
    for row in table:
        print(
            f"{row['method']:<20}{row['auroc']:>9.3f} ±{row['auroc_interval']:.3f}"
            f"{row['unsafe_of_dropped']:>14.1%} ±{row['unsafe_of_dropped_interval']:.1%}{row['unsafe_of_all']:>14.1%}"
        )


if __name__ == "__main__":
    main()
