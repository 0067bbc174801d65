"""
Do in-run values find flipped labels? AUROC of the flipped pairs of the built-in corpus by their accumulated value.

One run per seed and setting: plain DPO (every pair is kept) on `--size` pairs of which 30% are flipped, with a clean
target; a pair's score is minus its value. 0.5 is chance.

    python benchmarks/flips.py --size 640 --steps 60 --seeds 0 1 2 3 4 --set layers=linear --set layers=all,taylor=2
"""

import argparse
import json
import tempfile
from pathlib import Path

import datasets
import numpy as np
import torch
from transformers import set_seed
from trl import DPOConfig, DPOTrainer

from dsel_trl import SelectionCallback, create_method
from dsel_trl.data.demo.corpus import demo_preferences
from dsel_trl.data.demo.model import build_demo_model


def auroc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Share of pairs (one positive, one not) in which the positive one has the higher score; ties count half."""
    known = np.isfinite(scores)
    scores, positive = scores[known], positive[known]
    order = np.unique(scores, return_inverse=True)[1]
    counts = np.bincount(order)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[order]
    ones = int(positive.sum())
    return float((ranks[positive].sum() - ones * (ones + 1) / 2) / (ones * (len(scores) - ones)))


def parsed(text: str) -> dict[str, object]:
    found: dict[str, object] = {}
    for part in text.split(","):
        key, _, value = part.partition("=")
        found[key] = int(value) if value.isdigit() else value
    return found


def run(model: Path, seed: int, size: int, steps: int, target: int, rate: float, parameters: dict) -> dict[str, float]:
    data = demo_preferences(seed, train_size=size, test_size=512)
    truth = np.array(data["train"]["truth_flipped"])
    set_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        args = DPOConfig(
            folder,
            max_steps=steps,
            per_device_train_batch_size=32,
            learning_rate=rate,
            warmup_steps=10,
            seed=seed,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        trainer = DPOTrainer(str(model), args=args, train_dataset=data["train"])
        followed = data["test"].select(range(target)).select_columns(["prompt", "chosen", "rejected"])
        method = create_method("inrun_shapley", target=followed, keep=1.0, **parameters)
        trainer.add_callback(SelectionCallback(trainer, method))
        result = trainer.train()
        ledger = trainer.selection.ledger
        return {
            "auroc": auroc(-ledger["inrun_shapley"], truth),
            # What the run says of each pair anyway, at its last visit.
            "auroc_margin": auroc(-ledger["implicit_margin"], truth),
            "seconds": result.metrics["train_runtime"],
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=640)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--target", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--set", dest="settings", action="append", help="parameters of inrun_shapley: a=1,b=x")
    parser.add_argument("--output", default="flips.json")
    options = parser.parse_args()
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model = Path(build_demo_model(Path(folder) / "model"))
        for text in options.settings or ["layers=linear"]:
            found = [
                run(model, seed, options.size, options.steps, options.target, options.rate, parsed(text))
                for seed in options.seeds
            ]
            rows.append({"setting": text, "seeds": options.seeds, "runs": found})
            means = {key: np.mean([one[key] for one in found]) for key in found[0]}
            each = " ".join(f"{one['auroc']:.3f}" for one in found)
            print(
                f"{text:40} AUROC {means['auroc']:.3f} ({each})  margin {means['auroc_margin']:.3f}  "
                f"{means['seconds']:.0f} s per run",
                flush=True,
            )
    Path(options.output).write_text(json.dumps({**vars(options), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
