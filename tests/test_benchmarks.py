"""The tables of the READMEs are those of the JSON files, and a benchmark is one small record."""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import __main__ as program
from benchmarks import flips, lds, tables
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


def test_datamodelling_scores_of_what_foretells_all_nothing_and_the_contrary():
    rng = np.random.default_rng(0)
    truth, chosen = rng.standard_normal((20, 4)), rng.random((40, 20)) < 0.5
    gains = chosen @ truth
    assert lds.lds([truth], chosen, gains, 20) == {"lds": 1.0, "interval": [1.0, 1.0], "runs": [1.0]}
    # Of two runs the mean counts.
    assert lds.lds([truth, -truth], chosen, gains, 20)["lds"] == pytest.approx(0.0)
    assert lds.lds([np.zeros_like(truth)], chosen, gains, 20)["lds"] == 0.0
    low, high = lds.lds([rng.standard_normal((20, 4))], chosen, gains, 200)["interval"]
    assert -0.5 < low < high < 0.5


def test_bm25_prefers_rare_words_and_short_texts():
    texts = ["the cat sat", "the dog sat", "the cat sat on the long wall", "the the the"]
    found = lds.bm25(texts, ["the cat"])[:, 0]
    assert found.argsort()[::-1].tolist() == [0, 2, 3, 1]


def test_flips_are_ranked_and_cells_have_names_of_their_own(tmp_path):
    options = argparse.Namespace(cells=str(tmp_path), output="", settings=list(flips.SETTINGS), sizes=[640])
    options.choose, options.seeds, options.steps = [0], [1, 2], 0
    cells = flips.cells(options)
    paths = [flips.cell_path(options, *cell) for cell in cells]
    assert len(set(paths)) == len(cells)
    for cell, path in zip(cells, paths, strict=True):
        best = "norms, cosine" in cell[0]
        path.write_text(json.dumps({"auroc": 0.7 + 0.1 * best, "auroc_margin": 0.5, "seconds": 1.0}))
    found = flips.report(options)
    assert found["missing"] == 0
    assert found["chosen"] == {"640": "in-run, norms, cosine"}
    assert all(row["seeds"] == [1, 2] for row in found["table"])
    assert "| in-run, norms, cosine | 0.800 ± 0.000 (chosen) |" in tables.flips(found)
