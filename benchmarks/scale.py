"""
Memory and time of the ledger and the plans at 10 million examples, on one core.

Prints a table and writes JSON.

    python -m benchmarks.scale --examples 10000000 --output scale.json
"""

import argparse
import json
import time
import tracemalloc

import numpy as np

from benchmarks.scale_plans import plans
from dsel_trl.bases.scored import keep_top
from dsel_trl.bases.unseen import with_unseen
from dsel_trl.core.composition import Composition
from dsel_trl.core.ledger import Ledger
from dsel_trl.core.registry import create_method
from dsel_trl.functional.order.dataset_decomposition import bucket_of_length
from dsel_trl.functional.ranking import keep_count
from dsel_trl.sampling.plan_sampler import PlanSampler
from tests.runs import make_run

LIMITS = {"ledger MB": 340.0, "rank and plan s": 3.0, "id us": 1.0}


def fill(examples: int) -> Ledger:
    """A ledger with four scores, a tenth of the examples unknown."""
    rng = np.random.default_rng(0)
    ledger = Ledger(examples)
    unknown = rng.random(examples) < 0.1
    for name in ("loss", "implicit_margin", "margin", "weight"):
        values = rng.standard_normal(examples, dtype=np.float32)
        values[unknown] = np.nan
        ledger.write(name, None, values, step=1)
    ledger.visit(np.arange(0, examples, 2))
    ledger.drop(unknown, "margin")
    return ledger


def timed(function, repeats: int = 3) -> float:
    """Seconds of the fastest of some runs."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def batch_plans(examples: int) -> dict[str, float]:
    """Time and extra memory of the batch planners on lengths as of web documents, 1 and 8 processes."""
    lengths = np.random.default_rng(2).lognormal(5.0, 1.0, examples).astype(np.int32).clip(1, 4096)
    ids, rows = np.arange(examples), {}
    for world in (1, 8):
        run = make_run(examples, trainer="sft", ledger=Ledger(1), epochs=3, world=world)
        planners = {
            "token_budget": create_method("token_budget"),
            "dataset_decomposition": create_method("dataset_decomposition", max_log2=12),
        }
        for name, method in planners.items():
            method._lengths = lengths
            if name == "dataset_decomposition":
                method._longest, method._budget = 12, 8 * world * 4096
                method._buckets = bucket_of_length(lengths, max_log2=12)
            rows[f"{name}, {world} processes: first plan s"] = timed(lambda m=method, r=run: m.batch(r, ids), 1)
            rows[f"{name}, {world} processes: later plan s"] = timed(lambda m=method, r=run: m.batch(r, ids), 1)
            tracemalloc.start()
            method.batch(run, ids)
            rows[f"{name}, {world} processes: plan MB"] = tracemalloc.get_traced_memory()[1] / 1e6
            tracemalloc.stop()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=10_000_000)
    parser.add_argument("--planner-examples", type=int, default=1_000_000, help="of each planner; 0 leaves them out")
    parser.add_argument("--output", default="scale.json")
    options = parser.parse_args()
    examples, planned = options.examples, options.planner_examples

    ledger = fill(examples)
    run = make_run(examples, ledger=ledger)
    rows = {"ledger MB": ledger.nbytes / 1e6}

    def rank_and_plan() -> np.ndarray:
        scores = with_unseen(ledger["margin"], run.plan_rng())
        mask = keep_top(scores, 0.4)
        return run.plan_rng().permutation(np.flatnonzero(mask))

    rows["rank and plan s"] = timed(rank_and_plan)
    for action in ("keep_top", "band", "sample", "curriculum"):
        methods = Composition([create_method("margin", action=action, keep=None if action == "band" else 0.4)])
        rows[f"margin, {action}: plan s"] = timed(lambda methods=methods: methods.plan(run), repeats=1)
    # `infobatch` plans from the losses and keeps weights besides.
    infobatch = create_method("infobatch")
    infobatch.setup(run)
    run.plans_made = 1
    rows["infobatch: plan s"] = timed(lambda: infobatch.plan(run, 1), repeats=1)
    run.plans_made = 0

    ids = rank_and_plan()
    for block in (8, 64):
        sampler = PlanSampler(lambda served, made: ids, min(len(ids), keep_count(0.1, examples)), block)
        seconds = timed(lambda sampler=sampler: sum(1 for _ in sampler), repeats=1)
        rows[f"id us (batch of {block})"] = 1e6 * seconds / len(sampler)
    batch = np.random.default_rng(1).integers(0, examples, 64)
    values = np.zeros(64, dtype=np.float32)
    rows["ledger write of a step of 64, us"] = 1e6 * timed(lambda: ledger.write("margin", batch, values, 2), 100)
    ids_total = examples
    rows["state_dict s"] = timed(lambda: ledger.state_dict(), 1)

    if planned:
        found = {**batch_plans(planned), **plans(planned)}
        rows.update({f"{planned:,} examples: {name}": value for name, value in found.items()})

    print(f"{ids_total:,} examples, 4 scores, one core")
    for name, value in rows.items():
        limit = next((limit for key, limit in LIMITS.items() if name.startswith(key)), None)
        print(f"{name:<66}{value:>12.3f}{'' if limit is None else f'   limit {limit:g}'}")
    with open(options.output, "w", encoding="utf-8") as file:
        json.dump({"examples": examples, "rows": rows, "limits": LIMITS}, file, indent=1)


if __name__ == "__main__":
    main()
