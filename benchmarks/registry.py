"""
The benchmarks: one small record each.

A new one is a script that prints a table and writes JSON to `--output`, and one more entry of `BENCHMARKS`. Where the
README or `benchmarks/README.md` shall show its table, two markers go there, `<!-- benchmark NAME: begin -->` and
`<!-- benchmark NAME: end -->`, and `python -m benchmarks NAME` fills what is between them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import tables

HERE = Path(__file__).parent
ROOT = HERE.parent
# The small pretrained model beside the real data.
MODEL = "{data}/../models/tiny128"


@dataclass(frozen=True)
class Benchmark:
    """
    One benchmark.

    Attributes:
        name (`str`):
            Its name; `results/<name>.json` holds what came of it.
        command (`tuple[str, ...]`):
            What is run, after `python`. `{output}` stands for the JSON file that it writes, `{data}` for the folder of
            real data, `{work}` for a folder of its own that is kept until it has finished.
        seeds (`tuple[int, ...]`):
            The seeds that its command uses; empty where nothing is drawn.
        table (`Callable[[dict], str]`):
            Markdown of what the JSON file holds.
        needs (`tuple[str, ...]`, *optional*):
            Files of the folder of real data without which it cannot run.
        result (`str`, *optional*, defaults to `"{output}"`):
            The JSON file, where the command has its own place for it.
    """

    name: str
    command: tuple[str, ...]
    seeds: tuple[int, ...]
    table: Callable[[dict[str, Any]], str] = tables.numbers
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
            result="{work}/ablation.json",
        ),
        Benchmark(
            "overhead",
            ("benchmarks/overhead.py", "--pairs", "40", "--output", "{output}"),
            seeds=(),
            table=tables.overhead,
        ),
        Benchmark("gpu", ("benchmarks/gpu.py", "--output", "{output}"), seeds=(0,), table=tables.gpu),
        Benchmark("scale", ("benchmarks/scale.py", "--examples", "10000000", "--output", "{output}"), seeds=(1,)),
        Benchmark(
            "scale_plans",
            ("benchmarks/scale_plans.py", "--examples", "1000000", "--output", "{output}"),
            seeds=(0,),
        ),
        Benchmark(
            "recovery",
            ("benchmarks/recovery.py", "--seeds", "3", "--output", "{output}"),
            seeds=(0, 1, 2),
            table=tables.recovery,
        ),
        Benchmark(
            "flips",
            ("benchmarks/flips.py", "--cells", "{work}", "--output", "{output}"),
            seeds=(0, 1, 2, 3, 4, 5, 6),
            table=tables.flips,
        ),
        Benchmark(
            "lds",
            (
                "benchmarks/lds.py",
                "--data",
                "{data}",
                "--model",
                "{data}/../models/tiny128",
                "--cells",
                "{work}",
                "--output",
                "{output}",
            ),
            seeds=(0, 1, 2),
            table=tables.lds,
            needs=("sft_domains_train.parquet", "sft_domains_test.parquet", "../models/tiny128/config.json"),
        ),
        Benchmark("influence", ("benchmarks/influence.py", "--output", "{output}"), seeds=(), table=tables.influence),
            "target",
            ("benchmarks/target.py", "--data", "{data}", "--model", MODEL, "--output", "{work}/target.json"),
            seeds=(0, 1, 2),
            table=tables.target,
            needs=tuple(f"sft_domains_{split}.parquet" for split in ("train", "validation", "test")),
            result="{work}/target.json",
        ),
        Benchmark(
            "safety",
            ("benchmarks/safety.py", "--data", "{data}", "--model", MODEL, "--output", "{work}/safety.json"),
            seeds=(2, 3, 4, 5, 6),
            table=tables.safety,
            needs=tuple(f"safety_mixture_{split}.parquet" for split in ("train", "validation")),
            result="{work}/safety.json",
        ),
        Benchmark(
            "continual",
            (
                "benchmarks/continual.py",
                "--stream",
                "{data}/continual_stream.parquet",
                "--model",
                MODEL,
                "--output",
                "{work}/continual.json",
            ),
            seeds=(0, 1, 2),
            table=tables.continual,
            needs=("continual_stream.parquet",),
            result="{work}/continual.json",
        ),
        Benchmark(
            "zip",
            ("benchmarks/zip_speed.py", "--data", "{data}/docs_varlen.parquet", "--out", "{output}"),
            seeds=(),
            needs=("docs_varlen.parquet",),
        ),
    )
}
