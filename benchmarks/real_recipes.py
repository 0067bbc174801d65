"""
Every recipe from the shell on real data: does it train to its end, how much does it keep, what does it take.

Recipes of `dsel sft` train on prompts and completions, all others on preference pairs; each is run as it is
but for the data, the model, the number of steps and what speaks of the demo corpus (`OVERRIDES`). Held-out losses are
not compared here: so few steps of so small a model show that a recipe works, not that its method helps. Prints a table
and writes JSON.

    python -m benchmarks.real_recipes --pairs PAIRS.parquet --completions COMPLETIONS.parquet --model MODEL
"""

import argparse
import concurrent.futures
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml
from real_pairs import subset

RECIPES = Path(__file__).parents[1] / "recipes"
# Recipes that read the truth of the demo corpus.
OWN = ("quickstart", "stages")
# The judge's scores of the real data are win probabilities with most of them near 0; their log-odds spread out.
LOGITS = {"score_chosen_column": "logit_chosen", "score_rejected_column": "logit_rejected"}
# Parameters that name the columns or the scale of the scores of the demo corpus.
OVERRIDES: dict[str, dict] = {
    "alignment_potential": LOGITS,
    "bees": LOGITS,
    "curry_dpo": LOGITS,
    "margin": LOGITS,
    "reward_augmented": LOGITS,
    "uni_dpo": {**LOGITS, "tau_good": 0.0},
    "dsir": {"target_column": "logit", "target_above": 0.0},
    "jest": {"clean_column": "logit_chosen", "clean_above": 0.0},
    "rho1": {"clean_column": "logit", "clean_above": 0.0},
    "dataset_decomposition": {"min_log2": 5, "max_log2": 9},
}


def kind_of(recipe: Path) -> str:
    """Which program a recipe is for: the lines before its first key say it."""
    found = re.search(r"`dsel (\w+) ", recipe.read_text(encoding="utf-8").split("\n\n")[0])
    assert found, f"{recipe} does not say how it is run"
    return found[1]


def run(recipe: Path, data: dict[str, str], options: argparse.Namespace, folder: Path) -> dict:
    kind = kind_of(recipe)
    selection = yaml.safe_load(recipe.read_text(encoding="utf-8"))["selection"]
    selection = [{**entry, **OVERRIDES.get(entry["name"], {})} for entry in selection]
    output = folder / recipe.stem
    arguments = {
        "config": recipe,
        "dataset_name": data["completions" if kind == "sft" else "pairs"],
        "model_name_or_path": options.model,
        "output_dir": output,
        "selection": json.dumps(selection),
        "max_steps": options.steps,
        "per_device_train_batch_size": 8,
        "max_length": 512 if kind == "sft" else 256,
        "warmup_steps": 2,
        "logging_steps": 5,
        "save_strategy": "no",
        "use_cpu": "true",
    }
    command = [sys.executable, "-m", "dsel_trl", kind]
    command += [part for key, value in arguments.items() for part in (f"--{key}", str(value))]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(options.threads)}
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    row = {"recipe": recipe.stem, "trainer": kind, "exit": done.returncode, "seconds": time.perf_counter() - started}
    if done.returncode:
        return {**row, "error": done.stderr.strip().splitlines()[-1]}
    found = sorted(output.rglob("selection/summary.json"))
    summary = json.loads(found[0].read_text(encoding="utf-8"))
    return {**row, "runs": len(found), "kept": summary.get("kept_fraction"), "steps": summary["steps"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", required=True, help="parquet file of preference pairs with scores")
    parser.add_argument("--completions", required=True, help="parquet file of prompts and completions with a score")
    parser.add_argument("--model", required=True, help="model to train (a small one)")
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--only", nargs="*", help=f"recipes to run, by name; default: all but {', '.join(OWN)}")
    parser.add_argument("--jobs", type=int, default=1, help="recipes at a time")
    parser.add_argument("--threads", type=int, default=1, help="threads of each")
    parser.add_argument("--output", default="real_recipes.json")
    options = parser.parse_args()
    names = options.only or sorted(path.stem for path in RECIPES.glob("*.yaml") if path.stem not in OWN)
    rows = []
    print(f"{'recipe':<24}{'trainer':<9}{'exit':>5}{'steps':>7}{'kept':>7}{'seconds':>9}", flush=True)
    with tempfile.TemporaryDirectory() as name, concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        folder = Path(name)
        data = {
            "pairs": subset(options.pairs, options.rows, folder),
            "completions": subset(options.completions, options.rows, folder),
        }
        for row in pool.map(lambda recipe: run(RECIPES / f"{recipe}.yaml", data, options, folder), names):
            rows.append(row)
            kept = "" if row.get("kept") is None else f"{row['kept']:.2f}"
            print(
                f"{row['recipe']:<24}{row['trainer']:<9}{row['exit']:>5}{row.get('steps', ''):>7}{kept:>7}"
                f"{row['seconds']:>9.0f}  {row.get('error', '')}",
                flush=True,
            )
    failed = [row["recipe"] for row in rows if row["exit"]]
    print(
        f"{len(rows) - len(failed)} of {len(rows)} recipes trained to the end" + (f"; not: {failed}" if failed else "")
    )
    with open(options.output, "w", encoding="utf-8") as file:
        json.dump({"options": vars(options), "rows": rows}, file, indent=1)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
