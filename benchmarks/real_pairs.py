"""
`dsel ablate` from the shell on real preference pairs with external scores: do methods run, and what comes of it.

Each method, stock and a random choice of the same share are trained with and without LoRA for the same number of steps
from the same model, and judged on held-out pairs. Prints both tables and writes JSON. With `--work` a run that was
stopped goes on.

    python -m benchmarks.real_pairs --train TRAIN.parquet --test TEST.parquet --model MODEL --seeds 0,1,2,3,4
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from datasets import Dataset

SCORES = {"score_chosen_column": "logit_chosen", "score_rejected_column": "logit_rejected"}
METHODS = {
    "alignment_potential": {"name": "alignment_potential", "keep": 0.4},
    "margin": {"name": "margin", "source": "explicit", "action": "keep_top", "keep": 0.4, **SCORES},
    "selective_dpo": {"name": "selective_dpo", "keep": 0.4},
    "infobatch": {"name": "infobatch"},
}
LORA = ["--use_peft", "--lora_r", "16", "--lora_alpha", "16", "--lora_target_modules", "all-linear"]


def subset(path: str, rows: int, folder: Path) -> str:
    """A file with a random choice of the rows, the same for every run."""
    dataset = Dataset.from_parquet(path, keep_in_memory=True).shuffle(seed=0)
    target = folder / Path(path).name
    dataset.select(range(min(rows, len(dataset)))).to_parquet(str(target))
    return str(target)


def ablate(options: argparse.Namespace, lora: bool, train: str, test: str, folder: Path) -> list[dict[str, Any]]:
    """The rows of one ablation."""
    output = folder / ("lora" if lora else "full")
    arguments = {
        "methods": json.dumps(METHODS),
        "seeds": options.seeds,
        "workers": options.workers,
        "model_name_or_path": options.model,
        "dataset_name": train,
        "eval_dataset_name": test,
        "output_dir": output,
        "max_steps": options.steps,
        "per_device_train_batch_size": options.batch,
        "per_device_eval_batch_size": 32,
        "max_length": 256,
        "learning_rate": 1e-3 if lora else 3e-4,
        "use_cpu": "true",
        "gradient_checkpointing": "false",
    }
    command = [sys.executable, "-m", "dsel_trl", "ablate", *(LORA if lora else [])]
    command += [part for key, value in arguments.items() for part in (f"--{key}", str(value))]
    done = subprocess.run(command, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if not (output / "ablation.json").is_file():
        raise SystemExit(done.returncode)
    found = json.loads((output / "ablation.json").read_text(encoding="utf-8"))["rows"]
    return [{"tuning": "LoRA" if lora else "full", **row} for row in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--train-rows", type=int, default=1000)
    parser.add_argument("--test-rows", type=int, default=400)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--work", help="folder of finished trainings")
    parser.add_argument("--output", default="real_pairs.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, work = Path(name), Path(options.work or name)
        (folder / "test").mkdir()
        train = subset(options.train, options.train_rows, folder)
        test = subset(options.test, options.test_rows, folder / "test")
        rows = [row for lora in (False, True) for row in ablate(options, lora, train, test, work)]
    # Of one accuracy, were the pairs independent: differences below twice that say nothing.
    error = 0.5 / math.sqrt(options.test_rows)
    print(f"standard error of an accuracy on {options.test_rows} pairs: {error:.1%}")
    Path(options.output).write_text(json.dumps({"standard_error": error, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
