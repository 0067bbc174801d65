"""The tables of the READMEs are those of the JSON files, and a benchmark is one small record."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import __main__ as program
from benchmarks.registry import BENCHMARKS, Benchmark

ROOT = Path(__file__).parents[1]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


@pytest.mark.parametrize("document", program.DOCUMENTS, ids=lambda path: path.parent.name)
def test_tables_are_those_of_the_results(document):
    text = document.read_text(encoding="utf-8")
    assert program.with_tables(text) == text, "results have changed: `python -m benchmarks --tables`"


def test_no_result_lies_elsewhere_and_each_says_how_it_came_about():
    assert not list(ROOT.glob("*.json"))
    assert {path.stem for path in RESULTS} <= set(BENCHMARKS)
    for path in RESULTS:
        record = json.loads(path.read_text(encoding="utf-8"))
        assert list(record) == ["name", "command", "seeds", "versions", "hardware", "seconds", "result"]
        assert record["command"].startswith("python ")
        assert {"python", "torch", "trl"} <= set(record["versions"])
        assert record["hardware"]["cores"] > 0
        assert BENCHMARKS[path.stem].table(record["result"]).startswith("| ")


def test_scripts_and_their_options_are_there():
    for benchmark in BENCHMARKS.values():
        if benchmark.command[0] != "-m":
            script = (ROOT / benchmark.command[0]).read_text(encoding="utf-8")
            assert all(word in script for word in benchmark.command if word.startswith("--")), benchmark.name


def test_a_text_that_was_changed_by_hand_is_noticed():
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    changed = re.sub(r"(benchmark overhead: begin -->.*?\| stock \| )[\d.]+", r"\g<1>9.999", text, flags=re.DOTALL)
    assert changed != text
    assert program.with_tables(changed) == text
    with pytest.raises(ValueError, match="'nothing' is of no benchmark"):
        program.with_tables("<!-- benchmark nothing: begin --><!-- benchmark nothing: end -->")
    with pytest.raises(ValueError, match="each of them once"):
        program.with_tables("<!-- benchmark overhead: end --><!-- benchmark overhead: begin -->")


def test_a_run_writes_a_result_and_a_failing_one_none(tmp_path, monkeypatch):
    monkeypatch.setattr(program, "HERE", tmp_path)
    code = "import json, sys; json.dump({'rows': {'a': {'b': 0.25}, 'n': 1200}}, open(sys.argv[1], 'w'))"
    good = Benchmark("good", ("-c", code, "{output}"), seeds=(3,))
    bad = Benchmark("bad", ("-c", "raise SystemExit(3)"), seeds=())
    absent = Benchmark("absent", ("-c", code, "{output}"), seeds=(), needs=("no.parquet",))
    assert program.run(good, tmp_path) == ""
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["good.json"]
    record = json.loads((tmp_path / "results" / "good.json").read_text())
    assert record["seeds"] == [3]
    assert str(tmp_path) not in record["command"]
    assert good.table(record["result"]).splitlines()[2:] == ["| a, b | 0.25 |", "| n | 1,200 |"]
    assert program.run(bad, tmp_path) == "it ended with exit code 3"
    assert "no.parquet" in program.run(absent, tmp_path)
    assert not (tmp_path / "results" / "bad.json").exists()


def test_an_unknown_name():
    done = subprocess.run([sys.executable, "-m", "benchmarks", "overhed"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "'overhed'" in done.stderr
