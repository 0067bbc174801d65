"""
Reruns the benchmarks, all of them or some by name, and makes the tables of the READMEs anew from what they found.

    python -m benchmarks                 # all that have no result yet, or one of another version of the package
    python -m benchmarks overhead --again
    python -m benchmarks --tables        # the tables alone
    python -m benchmarks --list

`results/<name>.json` holds the command, versions, hardware, seeds, and what the benchmark wrote. What has a result is
not run again, so an interrupted call goes on with the next one.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .registry import BENCHMARKS, HERE, ROOT, Benchmark
from .tables import markdown

DOCUMENTS = (ROOT / "README.md", HERE / "README.md")
# What stands for the places of a command in what is written down: no path of this machine.
SHOWN = {"output": "OUT.json", "data": "DATA", "models": "MODELS", "packages": "PACKAGES", "work": "WORK"}
PACKAGES = ("dsel-trl", "torch", "trl", "transformers", "accelerate", "peft", "datasets", "numpy")


def hardware() -> dict[str, Any]:
    """What it ran on."""
    import torch

    found: dict[str, Any] = {"machine": platform.machine(), "cores": len(os.sched_getaffinity(0))}
    if torch.cuda.is_available():
        found["accelerator"] = torch.cuda.get_device_name(0)
    return found


def versions() -> dict[str, str]:
    """Of Python and of what matters."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def run(benchmark: Benchmark, shared: dict[str, str]) -> str:
    """
    Runs a benchmark and writes its result; what kept it from that, if anything did.

    Args:
        benchmark (`Benchmark`):
            Which.
        shared (`dict[str, str]`):
            Folders of `data`, `models` and `packages`.
    """
    if missing := [name for name in benchmark.needs if not Path(_filled(name, shared)).exists()]:
        option = missing[0][1:].split("}")[0]
        return f"{_filled(missing[0], shared)} is not there (--{option})"
    output = HERE / "results" / f".{benchmark.name}.partial.json"
    output.parent.mkdir(exist_ok=True)
    work = ROOT / "outputs" / "benchmarks" / benchmark.name
    work.mkdir(parents=True, exist_ok=True)
    places = {**shared, "output": str(output), "work": str(work)}
    command = [_filled(word, places) for word in benchmark.command]
    started = time.perf_counter()
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env={**os.environ, "PYTHONPATH": paths})
    if done.returncode:
        return f"it ended with exit code {done.returncode}"
    found = json.loads(Path(_filled(benchmark.result, places)).read_text(encoding="utf-8"))
    output.unlink(missing_ok=True)
    record = {
        "name": benchmark.name,
        "command": " ".join(["python", *(_filled(word, SHOWN) for word in benchmark.command)]),
        "seeds": list(benchmark.seeds),
        "versions": versions(),
        "hardware": hardware(),
        "seconds": round(time.perf_counter() - started),
        "result": found,
    }
    temporary = output.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    temporary.replace(result_file(benchmark.name))
    return ""


def _filled(word: str, places: dict[str, str]) -> str:
    """A word of a command with its places filled in."""
    for name, value in places.items():
        word = word.replace(f"{{{name}}}", value)
    return word


def result_file(name: str) -> Path:
    """Where a benchmark's result is."""
    return HERE / "results" / f"{name}.json"


def with_tables(text: str) -> str:
    """
    A document with the tables between its markers made anew from the results.

    Raises:
        `ValueError`: for a marker of no benchmark, without its end, or of a benchmark without a result.
    """
    for name in re.findall(r"<!-- benchmark ([\w-]+): begin -->", text):
        if name not in BENCHMARKS:
            raise ValueError(f"The marker of {name!r} is of no benchmark; there are {', '.join(BENCHMARKS)}.")
        begin, end = (f"<!-- benchmark {name}: {word} -->" for word in ("begin", "end"))
        if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
            raise ValueError(f"The table of {name!r} stands between {begin!r} and {end!r}, each of them once.")
        if not result_file(name).is_file():
            raise ValueError(f"{name!r} has no result: `python -m benchmarks {name}`.")
        record = json.loads(result_file(name).read_text(encoding="utf-8"))
        before, after = text.split(begin)[0], text.split(end)[1]
        text = f"{before}{begin}\n\n{BENCHMARKS[name].table(record['result'])}\n\n{end}{after}"
    begin, end = (f"<!-- measured: {word} -->" for word in ("begin", "end"))
    if begin in text:
        text = f"{text.split(begin)[0]}{begin}\n\n{measured()}\n\n{end}{text.split(end)[1]}"
    return text


def measured() -> str:
    """The table of the front page: the lines of all benchmarks that have a result."""
    rows = []
    for name, benchmark in BENCHMARKS.items():
        if benchmark.brief is not None and result_file(name).is_file():
            record = json.loads(result_file(name).read_text(encoding="utf-8"))
            rows += [[what, figure, f"`{name}`"] for what, figure in benchmark.brief(record["result"])]
    return markdown(["what", "figure", "benchmark"], rows)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="benchmarks to run (default: all)")
    parser.add_argument("--again", action="store_true", help="run what has a result too")
    parser.add_argument("--tables", action="store_true", help="run nothing, only make the tables anew")
    parser.add_argument("--list", action="store_true", help="list the benchmarks")
    parser.add_argument("--data", default=str(ROOT / "shared" / "data"), help="folder of real data")
    parser.add_argument("--models", default=str(ROOT / "shared" / "models"), help="folder of models")
    parser.add_argument("--packages", default=str(ROOT / "shared" / "packages"), help="folder of installed packages")
    options = parser.parse_args()
    if options.list:
        for name, benchmark in BENCHMARKS.items():
            state = "has a result" if result_file(name).is_file() else ""
            print(f"{name:<14}{state:<14}python {' '.join(benchmark.command)}")
        return 0
    if unknown := [name for name in options.names if name not in BENCHMARKS]:
        parser.error(f"there is no benchmark {unknown[0]!r}, only {', '.join(BENCHMARKS)}")
    failures = {}
    for name in [] if options.tables else options.names or BENCHMARKS:
        if result_file(name).is_file() and not options.again and name not in options.names:
            print(f"{name}: has a result")
            continue
        print(f"{name}: runs", flush=True)
        shared = {key: str(Path(getattr(options, key)).resolve()) for key in ("data", "models", "packages")}
        if why := run(BENCHMARKS[name], shared):
            failures[name] = why
    for document in DOCUMENTS:
        document.write_text(with_tables(document.read_text(encoding="utf-8")), encoding="utf-8")
    for name, why in failures.items():
        print(f"{name}: failed: {why}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
