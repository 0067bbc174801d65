"""
Does a trusted set of refusals find the unsafe answers of a mixture?

Trains a small model on a mixture of benign rows, refusals and unsafe stubs, with each method steered by the same
trusted set: the refusals of the validation file. Says how well the method's scores tell the unsafe rows from the rest
(AUROC: 1 = all of them have lower scores), and which share of the dropped 20% is unsafe, beside the share in the
mixture. Labels are for judging only: no method sees them. Each method and seed is a process of its own, as many at a
time as `--workers`. Prints a table and writes JSON.

    python benchmarks/safety.py --data FOLDER --model MODEL --seeds 0 1 2 3 4 --workers 8 --output safety.json
"""

import argparse
import json
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np

UNSAFE, TRUSTED = "unsafe_stub", "safe_refusal"
DROPPED = 0.2
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "seal": ("seal", {"burn_in": 2}),
    "seal: u = 0.5": ("seal", {"burn_in": 2, "upper": 0.5, "decay": 0.0}),
    "seal: adam": ("seal", {"burn_in": 2, "update": "adam"}),
    "gotd": ("gotd", {}),
    "knn_shapley": ("knn_shapley", {}),
    "random": ("random", {"refresh": "never"}),
}


def auroc(scores: np.ndarray, low: np.ndarray) -> float:
    """Probability that a row of `low` has a lower score than another row; equal ones count half."""
    _, codes, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[codes]
    rest = int((~low).sum())
    return float((ranks[~low].sum() - rest * (rest + 1) / 2) / (rest * int(low.sum())))


def measure(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One run of one method: its AUROC, the unsafe share of what it drops, and the seconds."""
    import torch
    from datasets import load_dataset
    from trl import SFTConfig, SFTTrainer

    from dsel_trl import SelectionCallback

    torch.set_num_threads(1)
    folder = Path(options.data)
    train, trusted = (
        load_dataset("parquet", data_files=str(folder / f"safety_mixture_{split}.parquet"), split="train")
        for split in ("train", "validation")
    )
    if options.rows:
        train = train.shuffle(seed=seed).select(range(min(options.rows, len(train))))
    trusted = trusted.filter(lambda row: row["label"] == TRUSTED).select_columns(["prompt", "completion"])
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as output:
        args = SFTConfig(
            output,
            num_train_epochs=3 if name.startswith("seal") else 1,
            max_steps=-1 if name.startswith("seal") else 1,
            per_device_train_batch_size=options.batch,
            learning_rate=options.learning_rate,
            lr_scheduler_type="constant",
            max_length=256,
            bf16=False,
            use_cpu=not torch.cuda.is_available(),
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=10_000,
            seed=seed,
        )
        data = train.select_columns(["prompt", "completion"]).add_column("place", range(len(train)))
        trainer = SFTTrainer(options.model, args=args, train_dataset=data)
        method, parameters = METHODS[name]
        follows = {} if method == "random" else {"target": trusted}
        callback = SelectionCallback(trainer, method, keep=1 - DROPPED, **follows, **parameters)
        trainer.add_callback(callback)
        trainer.train()
        # The trainer leaves out rows without a trained token.
        unsafe = np.array(train["label"])[callback.run.column("place").astype(int)] == UNSAFE
        dropped = callback.ledger.dropped.copy()
        scores = ~dropped if method == "random" else callback.ledger[method].copy()
    return {
        "method": name,
        "seed": seed,
        "auroc": auroc(np.asarray(scores, dtype=float), unsafe),
        "unsafe_of_dropped": float(unsafe[dropped].mean()),
        "unsafe_of_all": float(unsafe.mean()),
        "seconds": time.perf_counter() - start,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with safety_mixture_train and _validation.parquet")
    parser.add_argument("--model", required=True)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--rows", type=int, default=0, help="training rows drawn by the seed; 0 takes all")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--output", default="safety.json")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(options.workers, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        jobs = [pool.submit(measure, name, seed, options) for name in options.methods for seed in options.seeds]
        for job in as_completed(jobs):
            rows.append(job.result())
            print(json.dumps(rows[-1]), flush=True)
    print(f"\n{'method':<20}{'AUROC':>16}{'unsafe of dropped':>22}{'unsafe of all':>16}")
    for name in options.methods:
        own = [row for row in rows if row["method"] == name]
        found, dropped, whole = (
            np.array([row[key] for row in own]) for key in ("auroc", "unsafe_of_dropped", "unsafe_of_all")
        )
        print(
            f"{name:<20}{found.mean():>9.3f} ±{found.std():.3f}{dropped.mean():>14.1%} ±{dropped.std():.1%}"
            f"{whole.mean():>14.1%}"
        )
    with open(options.output, "w", encoding="utf-8") as file:
        json.dump({"options": vars(options), "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
