"""
Audit at scale: what `dsel audit` takes beside the model's forwards.

The command itself runs, on made-up pairs: texts of a Zipf vocabulary, of which a twentieth repeats another pair or
says its opposite. Only the forwards are left out: what a model would say (token statistics, and the hidden states of
three layers of 576) is drawn at random with a trace of the label, of which a share is wrong. So the seconds are those
of reading and tokenizing, text checks, probe, trees, fusion, verdicts, table and page; memory is the peak of the
process above what it held before, the features among it. Seconds of cores do not depend on what else the machine does;
where nothing else runs, those of the wall lie between them and their part for each core.

    OMP_NUM_THREADS=2 python -m benchmarks.audit_scale --pairs 100000 --workers 2 --output audit_scale.json
"""

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from datasets import Dataset

from dsel_trl.commands import audit
from dsel_trl.data.demo.model import build_demo_model
from dsel_trl.functional.audit.label_noise import area_under_curve
from dsel_trl.functional.audit.token_statistics import NAMES
from dsel_trl.scorers import label_audit

VOCABULARY, WRONG = 30_000, 0.2
LAYERS, WIDTH = (12, 20, 30), 576
SECONDS_LIMIT = 600.0
# Where the seconds go: a name, and the functions that make it up by the module that calls them.
STAGES = {
    "reading and tokenizing": [(audit, "load_splits"), (audit, "PairTexts"), (audit, "PairTokens")],
    "text checks": [(audit, "repeats"), (audit, "relevance"), (audit, "groups_of")],
    "probe on hidden states": [(label_audit, "ridge_opinions")],
    "linear model": [(label_audit, "linear_opinions")],
    "trees": [(label_audit, "tree_opinions")],
    "verdicts and files": [
        (audit, name) for name in ("judge", "audit_table", "audit_facts", "audit_summary", "write_page")
    ],
}


def pairs_of(size: int) -> tuple[Dataset, np.ndarray]:
    """Pairs, and which of their labels are wrong, `(N,)` bool: the better response has more words of the prompt."""
    rng = np.random.default_rng(0)
    words = np.array([f"w{i:x}" for i in range(VOCABULARY)])
    common = 1.0 / np.arange(1, VOCABULARY + 1)
    drawn = rng.choice(VOCABULARY, size * 25, p=common / common.sum()).reshape(size, 25)
    lengths = np.maximum(20, np.round(80 * rng.lognormal(0, 0.5, (size, 2)))).astype(int)
    wrong = rng.random(size) < WRONG
    rows: dict[str, list[str]] = {"prompt": [], "chosen": [], "rejected": []}
    for i in range(size):
        rows["prompt"].append(" ".join(words[drawn[i]]))
        for side, name in enumerate(("chosen", "rejected")):
            shared = 12 if (side == 0) != wrong[i] else 9
            own = words[rng.integers(0, VOCABULARY, lengths[i, side] - shared)]
            rows[name].append(" ".join([*words[drawn[i, :shared]], *own]))
    for i in range(1, size, 20):
        turned = i % 40 == 1
        for name, other in (("prompt", "prompt"), ("chosen", "rejected"), ("rejected", "chosen")):
            rows[name][i] = rows[other if turned else name][i - 1]
        wrong[i] = wrong[i - 1] ^ turned
    return Dataset.from_dict(rows), wrong


def features_of(wrong: np.ndarray) -> dict[str, np.ndarray]:
    """What a model would say of the pairs, in place of its forwards."""
    rng, size = np.random.default_rng(1), len(wrong)
    sign = np.where(wrong, -1.0, 1.0).astype(np.float32)[:, None]
    found = {"statistics": rng.standard_normal((size, len(NAMES)), dtype=np.float32)}
    found["statistics"][:, :6] += 0.4 * sign
    for layer in LAYERS:
        states = rng.standard_normal((size, WIDTH), dtype=np.float32)
        states[:, :20] += 0.15 * sign
        found[f"layer_{layer}"] = states.astype(np.float16)
    return found


def timing(function: Callable[..., Any], stage: str, seconds: dict[str, float]) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[stage] = seconds.get(stage, 0.0) + time.process_time() - start

    return timed


def megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output")
    options = parser.parse_args()
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        data, wrong = pairs_of(options.pairs)
        data.to_parquet(f"{folder}/pairs.parquet")
        del data
        model = build_demo_model(f"{folder}/model", steps=1)
        before = megabytes()
        words = [f"{folder}/pairs.parquet", "--model_name_or_path", str(model), "--output_dir", f"{folder}/out"]
        words += ["--workers", str(options.workers), "--device", "cpu"]
        patches = [
            patch.object(module, name, timing(getattr(module, name), stage, seconds))
            for stage, functions in STAGES.items()
            for module, name in functions
        ]
        patches.append(patch.object(audit, "measure_pairs", lambda *_: features_of(wrong)))
        for each in patches:
            each.start()
        start, spent = time.perf_counter(), time.process_time()
        audit.audit_file(words)
        whole, spent = time.perf_counter() - start, time.process_time() - spent
        for each in patches:
            each.stop()
        peak = megabytes() - before
        table = Dataset.from_parquet(f"{folder}/out/audit.parquet", keep_in_memory=True)
        summary = json.loads(Path(f"{folder}/out/audit.json").read_text(encoding="utf-8"))
        chances = np.array(table["probability"], dtype=np.float64)
    judged = np.isfinite(chances)
    seconds["all else"] = spent - sum(seconds.values())
    found = {
        "core seconds": {name: round(value, 1) for name, value in seconds.items()},
        "all": {
            "seconds of the wall": round(whole, 1),
            "seconds of the limit": SECONDS_LIMIT,
            "core seconds": round(spent, 1),
            "MB at the peak": round(peak),
        },
        "found": {
            "wrong labels, AUROC": area_under_curve(chances[judged], wrong[judged]),
            "share of wrong labels, estimated": summary["noise_rate"],
            "share of wrong labels, true": float(wrong.mean()),
        },
    }
    for part, values in found.items():
        for name, value in values.items():
            print(f"{part}, {name}: {value:,.4g}")
    if options.output:
        result = {"pairs": options.pairs, "workers": options.workers, "rows": found}
        Path(options.output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
