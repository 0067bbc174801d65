"""
Which methods find the data of a target in a mixture, and is a model the better for it?

The candidates are rows of five domains mixed; the target is the validation set of one of them. Each method keeps 20%
of the candidates and trains on them for as many optimizer steps as the others. Reported are the share of the right
domain among what was trained, and the loss on that domain's test rows, beside a random 20% and all candidates of the
right domain (which no method is told). Each cell is a process of its own; finished ones are skipped.

    python -m benchmarks.target --data FOLDER --model MODEL --output target.json --workers 8
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from benchmarks.cells import add_options, averages, circumstances, interval, run_cells, training
from dsel_trl.data.files import write_json

KEEP = 0.2
RIGHT, RANDOM = "right domain", "random"
# At their defaults, but for Quad, whose clusters and draws are for runs of more than a hundred steps.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "gotd": ("gotd", {}),
    "quad": ("quad", {"clusters": 16, "draws": 8, "refresh": 2, "target_refresh": 50}),
    "knn_shapley": ("knn_shapley", {}),
    "dsir": ("dsir", {"refresh": "never"}),
    "cosine_relevance": ("cosine_relevance", {}),
    "jsd_relevance": ("jsd_relevance", {}),
    RANDOM: ("random", {"refresh": "never"}),
    RIGHT: ("", {}),
}


def rows_of(options: argparse.Namespace, split: str) -> Dataset:
    return Dataset.from_parquet(str(Path(options.data) / f"sft_domains_{split}.parquet"), keep_in_memory=True)


def of_domain(rows: Dataset, domain: str) -> Dataset:
    return rows.select(np.flatnonzero(np.array(rows["domain"][:]) == domain))


def measure(options: argparse.Namespace, name: str, domain: str, seed: int) -> dict[str, Any]:
    """One training: the right domain's share of what was trained, and the loss on its test rows."""
    from trl import SFTConfig, SFTTrainer

    from dsel_trl import SelectionCallback

    train = rows_of(options, "train").shuffle(seed=seed)
    train = train.select(range(min(options.rows, len(train))))
    columns = ["prompt", "completion"]
    target = of_domain(rows_of(options, "validation"), domain).select_columns(columns)
    test = of_domain(rows_of(options, "test"), domain).select_columns(columns)
    test = test.select(range(min(options.test_rows, len(test))))
    mixed = float(np.mean(np.array(train["domain"][:]) == domain))
    if name == RIGHT:
        train = of_domain(train, domain)
    with tempfile.TemporaryDirectory() as output:
        trainer = SFTTrainer(
            options.model,
            args=SFTConfig(
                **training(options, output, seed),
                max_steps=options.steps,
                per_device_train_batch_size=options.batch,
                per_device_eval_batch_size=32,
                learning_rate=options.learning_rate,
                max_length=256,
            ),
            train_dataset=train.select_columns(columns).add_column("place", range(len(train))),
            eval_dataset=test,
        )
        before = trainer.evaluate()["eval_loss"]
        # The stock run is measured with the same callback: what it trained is in its ledger too.
        method, parameters = METHODS[name]
        follows = {} if name in (RANDOM, RIGHT) else {"target": target}
        chosen = {"keep": KEEP} if method else {}
        callback = SelectionCallback(trainer, method or "uniform", **chosen, **follows, **parameters)
        trainer.add_callback(callback)
        trainer.train()
        # The trainer leaves out rows without a trained token.
        right = np.array(train["domain"][:])[callback.run.column("place").astype(int)] == domain
        visits = callback.ledger.visits.astype(float)
        return {
            "method": name,
            "domain": domain,
            "seed": seed,
            "share": float(visits[right].sum() / visits.sum()),
            "mixed": mixed,
            "loss": trainer.evaluate()["eval_loss"],
            "before": before,
            "examples": int((visits > 0).sum()),
        }


def summary(rows: list[dict[str, Any]], options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per domain and method: means over the seeds, and the loss less that of a random choice, seed by seed."""
    by_cell = {(row["method"], row["domain"], row["seed"]): row for row in rows}
    table = []
    for domain in options.domains:
        for name in options.methods:
            own = [row for row in rows if (row["method"], row["domain"]) == (name, domain)]
            if not own:
                continue
            line: dict[str, Any] = {"domain": domain, "method": name, "seeds": [row["seed"] for row in own]}
            line |= averages(own, ("share", "mixed", "loss", "before"))
            pairs = [(row, by_cell.get((RANDOM, domain, row["seed"]))) for row in own]
            apart = [row["loss"] - other["loss"] for row, other in pairs if other is not None]
            if apart and name != RANDOM:
                line |= {"against_random": statistics.mean(apart), "against_random_interval": interval(apart)}
            table.append(line)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with sft_domains_train, _validation and _test.parquet")
    parser.add_argument("--model", required=True)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--domains", nargs="+", default=["gsm8k", "code_alpaca", "dolly"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rows", type=int, default=2000, help="candidates, drawn by the seed")
    parser.add_argument("--test-rows", type=int, default=200)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    add_options(parser)
    options = parser.parse_args()
    cells = [(name, domain, seed) for seed in options.seeds for domain in options.domains for name in options.methods]
    rows = run_cells(measure, cells, options)
    table = summary(rows, options)
    write_json(Path(options.output), {**circumstances(options, cells, rows), "table": table})
    print(f"{'target':<14}{'method':<20}{'right domain':>18}{'test loss':>18}{'less random':>20}")
    for row in table:
        apart = (
            f"{row['against_random']:+.4f} ±{row['against_random_interval']:.4f}" if "against_random" in row else "-"
        )
        share = f"{row['share']:.1%} ±{row['share_interval']:.1%}"
        loss = f"{row['loss']:.4f} ±{row['loss_interval']:.4f}"
        print(f"{row['domain']:<14}{row['method']:<20}{share:>18}{loss:>18}{apart:>20}")


if __name__ == "__main__":
    main()
