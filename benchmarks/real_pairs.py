"""
`dsel dpo` from the shell on real preference pairs with external scores: does every method run, and what comes of it.

Each method is trained with and without LoRA for the same number of steps from the same model, and judged on held-out
pairs (the share whose policy-minus-reference log-probability is higher for the chosen response). Prints a table and
writes JSON.

    python benchmarks/real_pairs.py --train TRAIN.parquet --test TEST.parquet --model MODEL --seeds 1
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from datasets import Dataset

METHODS = {
    "alignment_potential": [{"name": "alignment_potential", "keep": 0.4}],
    "margin": [
        {
            "name": "margin",
            "source": "explicit",
            "action": "keep_top",
            "keep": 0.4,
            "score_chosen_column": "logit_chosen",
            "score_rejected_column": "logit_rejected",
        }
    ],
    "selective_dpo": [{"name": "selective_dpo", "keep": 0.4}],
    "infobatch": [{"name": "infobatch"}],
    "random": [{"name": "random", "keep": 0.4}],
    "stock": None,
}


def subset(path: str, rows: int, folder: Path) -> str:
    """A file with a random choice of the rows, the same for every run."""
    dataset = Dataset.from_parquet(path, keep_in_memory=True).shuffle(seed=0)
    target = folder / Path(path).name
    dataset.select(range(min(rows, len(dataset)))).to_parquet(str(target))
    return str(target)


def run(method: str, lora: bool, seed: int, options: argparse.Namespace, train: str, test: str, folder: Path) -> dict:
    output = folder / f"{method}-{'lora' if lora else 'full'}-{seed}"
    arguments = {
        "model_name_or_path": options.model,
        "dataset_name": train,
        "eval_dataset_name": test,
        "output_dir": output,
        "max_steps": options.steps,
        "per_device_train_batch_size": options.batch,
        "per_device_eval_batch_size": 32,
        "max_length": 256,
        "learning_rate": 1e-3 if lora else 3e-4,
        "seed": seed,
        "logging_steps": max(1, options.steps // 4),
        "report_to": "none",
        "use_cpu": "true",
        "save_strategy": "no",
        "gradient_checkpointing": "false",
    }
    selection = METHODS[method]
    command = [sys.executable, "-m", "dsel_trl", "dpo", "--compare", "stock" if selection is None else "selection"]
    command += [part for key, value in arguments.items() for part in (f"--{key}", str(value))]
    if selection is not None:
        command += ["--selection", json.dumps(selection)]
    if lora:
        command += ["--use_peft", "--lora_r", "16", "--lora_alpha", "16", "--lora_target_modules", "all-linear"]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    seconds = time.perf_counter() - started
    if done.returncode:
        print(done.stderr[-2000:], file=sys.stderr)
        return {"exit": done.returncode, "accuracy": math.nan, "seconds": seconds, "kept": math.nan}
    (row,) = json.loads((output / "comparison.json").read_text())["runs"]
    summary = output / "selection" / "selection" / "summary.json"
    kept = json.loads(summary.read_text())["kept_fraction"] if summary.is_file() else 1.0
    return {"exit": 0, "accuracy": row["rewards/accuracies"], "seconds": seconds, "kept": kept}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--train-rows", type=int, default=1000)
    parser.add_argument("--test-rows", type=int, default=400)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--output", default="real_pairs.json")
    options = parser.parse_args()
    rows = []
    print(f"{'method':<22}{'tuning':<8}{'exit':>5}{'kept':>7}{'held-out accuracy':>22}{'seconds':>9}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "test").mkdir()
        train = subset(options.train, options.train_rows, folder)
        test = subset(options.test, options.test_rows, folder / "test")
        for method in METHODS:
            for lora in (False, True):
                runs = [run(method, lora, seed, options, train, test, folder) for seed in range(options.seeds)]
                accuracies = [result["accuracy"] for result in runs]
                spread = statistics.stdev(accuracies) if len(runs) > 1 else 0.0
                row = {
                    "method": method,
                    "lora": lora,
                    "exit": max(result["exit"] for result in runs),
                    "accuracy": statistics.mean(accuracies),
                    "spread": spread,
                    "kept": statistics.mean(result["kept"] for result in runs),
                    "seconds": statistics.mean(result["seconds"] for result in runs),
                }
                rows.append(row)
                print(
                    f"{method:<22}{'LoRA' if lora else 'full':<8}{row['exit']:>5}{row['kept']:>7.2f}"
                    f"{row['accuracy']:>14.1%} ± {spread:<5.1%}{row['seconds']:>9.0f}",
                    flush=True,
                )
    # The standard error of one accuracy, were the pairs independent: differences below twice that say nothing.
    print(f"standard error of an accuracy on {options.test_rows} pairs: {0.5 / math.sqrt(options.test_rows):.1%}")
    with open(options.output, "w", encoding="utf-8") as file:
        json.dump({"options": vars(options), "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
