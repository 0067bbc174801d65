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
from benchmarks import cells, continual, flips, lds, safety, tables
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
        if benchmark.command[1] != "dsel_trl":
            package, name = benchmark.command[1].split(".")
            script = (ROOT / package / f"{name}.py").read_text(encoding="utf-8")
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
    monkeypatch.setattr(program, "ROOT", tmp_path)
    code = "import json, sys; json.dump({'rows': {'a': {'b': 0.25}, 'n': 1200}}, open(sys.argv[1], 'w'))"
    shared = {"data": str(tmp_path), "models": str(tmp_path), "packages": str(tmp_path)}
    good = Benchmark("good", ("-c", code, "{output}"), seeds=(3,))
    bad = Benchmark("bad", ("-c", "raise SystemExit(3)"), seeds=())
    absent = Benchmark("absent", ("-c", code, "{output}"), seeds=(), needs=("{data}/no.parquet",))
    assert program.run(good, shared) == ""
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["good.json"]
    record = json.loads((tmp_path / "results" / "good.json").read_text())
    assert record["seeds"] == [3]
    assert str(tmp_path) not in record["command"]
    assert good.table(record["result"]).splitlines()[2:] == ["| a, b | 0.25 |", "| n | 1,200 |"]
    assert program.run(bad, shared) == "it ended with exit code 3"
    assert "no.parquet" in program.run(absent, shared)
    assert not (tmp_path / "results" / "bad.json").exists()


RANGED = {"interval": [1.1, 1.4], "ratio": 1.25, "tokens_per_second": 2064.0, "share": 0.97}
DIFFERENCES = {f"against_{other}{end}": 0.02 for other in ("stock", "random") for end in ("", "_low", "_high")}
ABLATED = {"variant": "margin", "seeds": [0, 1], "mean": 0.75, "deviation": 0.01, "kept_fraction": 0.4, "steps": 12.0,
           "flipped_dropped": 0.9, "clean_dropped": 0.1, **DIFFERENCES}  # fmt: skip
PLANTED = {"recipe": "audit_soft", "rate": 0.4, "seeds": [2, 3], "accuracy": 0.74, "recovered": 0.91, "auroc": 0.9,
           "recovered_interval": [0.8, 1.0], "auroc_interval": [0.88, 0.92]}  # fmt: skip
JUDGED = {"set": "pandalm", "judge": "gpt35", "variant": "all", "pairs": 849, "auroc": 0.81,
          "single": {"length": 0.69}, "auroc_interval": [0.77, 0.85], "judge_right": 0.815, "right_after_flips": 0.83,
          "calibration_error_labels": 0.02, "calibration_error_truth": 0.03}  # fmt: skip
RECOVERED = [
    {"name": name, "kind": "drops", "uses": "model", "steps": 1024.0, "verdict": "no better than random",
     "dropped": [0.5, 0.0], "flipped_among_dropped": [0.31, 0.02], "flipped_among_kept": None}
    for name in ("margin", "margin: explicit", "selective_dpo", "random")
]  # fmt: skip
MEASURED = {"what": "inrun_shapley: 6M sft, LoRA r=8, 8 x 256 tokens", "ratio": 1.051, "quartiles": [1.015, 1.104],
            "limit": 1.08, "control": 0.98, "refresh_in_steps": 0.99, "mean_ratio_at": {"20": 1.1},
            "memory_ratio": 1.01, "others": {"loop": {"in_steps": 0.85}, "vmap": {"error": "no"}}}  # fmt: skip
OF_MOMENTS = {"what": "less: 6M", "limit": None, "refresh_in_steps": 1.2, "memory_ratio": 1.01}
RIVAL = {"rank_correlation": 1.0, "dsel_trl": {"stock_seconds": 0.2, "ratio": 1.13},
         "dattri-llm": {"stock_seconds": 0.2, "ratio": 1.34}}  # fmt: skip
FORETOLD = [{"method": name, "lds": 0.3, "interval": [0.2, 0.4]} for name in lds.METHODS]
ZIPPED = {"documents": 2000, "k1": 1000, "k2": 200, "k3": 100, "budget": 200, "plain_seconds": 81.2, "same": True,
          "package_seconds": 5.48, "speed_ratio": 14.8}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "result", "in_table", "in_brief"),
    [
        ("quickstart", {"rows": [ABLATED]}, "| 75.0% ± 1.0 | +2.0 [+2.0, +2.0] | 90.0% |", "75.0%"),
        ("equal_compute", {"rows": [ABLATED]}, "| 75.0% ± 1.0 |", "75.0%"),
        ("real_pairs", {"rows": [{"tuning": "LoRA", **ABLATED}], "standard_error": 0.029}, "| LoRA | 0.40 |", None),
        (
            "real_recipes",
            {"rows": [{"recipe": "zip", "trainer": "sft", "exit": 0, "seconds": 31.2}]},
            "| 0 | - |",
            None,
        ),
        ("vsl", {"max_length": 8, "docs": {"token_budget": RANGED, "other": {}}}, "1.25 (1.10-1.40)", "1.25x"),
        ("planted", {"table": [PLANTED], "chosen": {"0.4": "audit_soft"}}, "(chosen) | 40%", "91% [80%, 100%]"),
        ("judges", {"table": [JUDGED]}, "0.810 [0.770, 0.850] | 0.690 (`length`)", "AUROC 0.810"),
        (
            "recovery",
            {"tables": {"defaults": RECOVERED}},
            "| 1,024 | 0.500 ± 0.000 | 0.310 ± 0.020 | - |",
            "31% / 31%",
        ),
        (
            "lds",
            {"halves": 48, "table": FORETOLD},
            "| BM25 | +0.300 [+0.200, +0.400] |",
            "0.30 [0.20, 0.40] / 0.30",
        ),
        ("influence", {"refresh": 20, "rows": [MEASURED]}, "| 0.85 | fails |", "1.05 / 1.10"),
        ("influence", {"refresh": 20, "rows": [MEASURED, OF_MOMENTS]}, "| less: 6M | - | - | - | 1.20 |", "1.05"),
        ("influence", {"refresh": 20, "rows": [MEASURED], "dattri": RIVAL}, "| dattri-llm | 0.20 | 1.34 |", "1.05"),
        ("zip", {"rows": [ZIPPED, {**ZIPPED, "speed_ratio": 39.7}, {}]}, "| 14.8 | yes |", "15x to 40x"),
        ("scale", {"examples": 10**7, "rows": {"ledger MB": 340.0, "rank and plan s": 0.553}}, "340", "0.55 s"),
        (
            "audit_scale",
            {"pairs": 100_000, "workers": 2, "rows": {"all": {"seconds of the wall": 330.0, "MB at the peak": 1900}}},
            "| all, MB at the peak | 1,900 |",
            "5.5 min, 1.9 GB",
        ),
    ],
)
def test_what_each_benchmark_shows(name, result, in_table, in_brief):
    benchmark = BENCHMARKS[name]
    assert in_table in benchmark.table(result)
    if in_brief is None:
        assert benchmark.brief is None
        return
    assert any(in_brief in figure for _, figure in benchmark.brief(result))


def test_the_front_page_says_nothing_that_no_result_holds():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    own = text.split("## What was measured")[1].split("\n## ")[0]
    before, table = own.split("<!-- measured: begin -->")
    table, after = table.split("<!-- measured: end -->")
    assert table.strip() == program.measured()
    assert not re.search(r"\d+(\.\d+)?(%|x| s\b| MB)", before + after), "a figure outside of the markers"


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
    options = argparse.Namespace(output=str(tmp_path / "a.json"), settings=list(flips.SETTINGS), sizes=[640])
    options.choose, options.seeds, options.steps = [0], [1, 2], 0
    wanted = flips.cells(options)
    assert len({cells.cell_path(options, cell) for cell in wanted}) == len(wanted)
    rows = [
        {"setting": setting, "size": size, "seed": seed, "auroc": 0.7 + 0.1 * ("norms, cosine" in setting)}
        for setting, size, seed in wanted
    ]
    found = flips.report(options, rows)
    assert found["chosen"] == {"640": "in-run, norms, cosine"}
    assert all(row["seeds"] == [1, 2] for row in found["table"])
    assert "| in-run, norms, cosine | 0.800 ± 0.000 (chosen) |" in tables.flips(found)


# ---- Cells ----


def counted(options, name, seed):
    """The work of a cell; which were done is in a file."""
    with open(options.log, "a", encoding="utf-8") as log:
        log.write(f"{name} {seed}\n")
    if name == "bad":
        raise ValueError("no luck")
    return {"name": name, "value": float(seed)}


def test_cells_are_done_once_and_a_failing_one_stops_none(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    cells.add_options(parser)
    options = parser.parse_args(["--output", str(tmp_path / "out.json"), "--workers", "1", "--device", "cpu"])
    options.log = str(tmp_path / "log")
    wanted = [("a b", 0), ("bad", 0), ("c", 1)]
    first = cells.run_cells(counted, wanted, options)
    assert [row["name"] for row in first] == ["a b", "c"]
    assert "('bad', 0): FAILED: ValueError: no luck" in capsys.readouterr().out
    options.report = True
    assert cells.run_cells(counted, wanted, options) == first
    assert (tmp_path / "log").read_text().splitlines() == ["a b 0", "bad 0", "c 1"]
    about = cells.circumstances(options, wanted, first)
    assert (about["missing"], about["where"]) == (1, ["CPU"])
    assert str(tmp_path) not in json.dumps({**about, "settings": {**about["settings"], "log": ""}})


def test_the_forgetting_of_a_stream_is_compared_seed_by_seed():
    def cell(method, seed, final, forgetting):
        return {"method": method, "seed": seed, "final": final, "forgetting": forgetting, "tokens": [10, 20],
                "steps": 4, "forwards": 5, "backwards": 6}  # fmt: skip

    rows = [cell("random replay", s, 2.0 + s, 0.5) for s in range(3)]
    rows += [cell("adapt_inf", s, 1.75 + s, 0.75 + s / 4) for s in range(3)]
    table = continual.summary(rows)
    own = next(row for row in table if row["method"] == "adapt_inf")
    assert (own["final_apart"], own["final_apart_interval"]) == (-0.25, 0.0)
    assert own["forgetting_apart"] == pytest.approx(0.5)
    # Half of the interval: 4.30 deviations (of 1/4) over the root of three.
    assert own["forgetting_apart_interval"] == pytest.approx(4.30 * 0.25 / 3**0.5)
    assert continual.verdict(table) == ["adapt_inf forgets no less than random replay and ends lower."]
    assert "| adapt_inf | 2.750 ± 2.483 | +1.000 ± 0.621 | -0.250 ± 0.000 | +0.500 ± 0.621 | 30 | 5 / 6 |" in (
        tables.continual({"table": table, "verdict": []})
    )


def test_the_share_of_unsafe_rows_that_a_score_finds():
    scores, unsafe = np.array([0.0, 1.0, 1.0, 2.0, 3.0]), np.array([True, True, False, False, False])
    # Of six pairs five and a half are in order.
    assert safety.auroc(scores, unsafe) == pytest.approx(5.5 / 6)
    assert safety.auroc(-scores, unsafe) == pytest.approx(0.5 / 6)
