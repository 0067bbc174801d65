"""`dsel report`: from the folder that a run has left to a page and pictures."""

import json
import re

import pytest
from datasets import Dataset

from dsel_trl.cli import main
from dsel_trl.commands.report import report_runs
from tests import tiny

WORDS = ["--max_steps", "2", "--per_device_train_batch_size", "4", "--use_cpu", "true", "--report_to", "none",
         "--save_strategy", "no", "--logging_steps", "1", "--gradient_checkpointing", "false"]  # fmt: skip


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    """A folder with pairs and a finished run on them that has dropped half."""
    folder = tmp_path_factory.mktemp("finished")
    rows = tiny.preferences(24)
    for name in ("score_chosen", "score_rejected"):
        if name in rows.column_names:
            rows = rows.remove_columns([name])
    rows = rows.add_column("score_chosen", [float(i) for i in range(24)]).add_column("score_rejected", [0.0] * 24)
    rows = rows.add_column("source", ["web", "books"] * 12)
    rows.to_parquet(folder / "pairs.parquet")
    words = ["dpo", "--dataset_name", str(folder / "pairs.parquet"), "--model_name_or_path", str(model), *WORDS]
    selection = "[{name: margin, source: explicit, keep: 0.5}]"
    assert main([*words, "--output_dir", str(folder / "run"), "--selection", selection]) == 0
    return folder


def data_of(file):
    return json.loads(re.search(r"id='data'>(.*?)</script>", file.read_text(), re.DOTALL)[1])


def test_why_a_pair_was_dropped_is_a_number(finished):
    said = report_runs([str(finished / "run")])
    file = finished / "run" / "report.html"
    assert f"Report: {file}" in said
    assert (finished / "run" / "report.png").read_bytes().startswith(b"\x89PNG")
    rows = Dataset.from_parquet(str(finished / "pairs.parquet"))
    dropped = [e for e in data_of(file)["examples"] if e["kind"] == "dropped"]
    assert sorted(e["id"] for e in dropped) == list(range(12))
    for e in dropped:
        assert (e["score"], e["visits"], e["step"]) == (float(e["id"]), 0, 0)
        assert e["reason"] == "margin: scores from 12 up are kept (keep_top, a share of 0.5)"
        said = dict(e["texts"])
        assert {"prompt", "chosen", "rejected"} <= set(said)
        assert said["prompt"] in str(rows[e["id"]]["prompt"])
    assert "Composition by source" in file.read_text()


def test_runs_side_by_side_and_mistakes(finished, tmp_path, capsys):
    run = str(finished / "run")
    assert main(["report", run, run, "--output_file", str(tmp_path / "two.html"), "--by", "source"]) == 0
    text = (tmp_path / "two.html").read_text()
    assert "Side by side" in text
    assert data_of(tmp_path / "two.html")["runs"] == ["run (1)", "run (2)"]
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["two-1.png", "two-2.png"]
    capsys.readouterr()
    for words, said in (
        ([str(tmp_path)], "holds no finished run"),
        ([str(finished)], "run"),
        ([run, "--by", "origin"], "'origin'"),
        ([run, "--dataset_name", "nowhere.parquet"], "nowhere.parquet"),
        ([run, "--exampels", "3"], "--exampels"),
    ):
        assert main(["report", *words]) == 2
        assert said in capsys.readouterr().err


def test_without_the_rows_there_is_a_page_without_texts(finished, tmp_path):
    summary = finished / "run" / "selection" / "summary.json"
    before = summary.read_text()
    try:
        summary.write_text(json.dumps({**json.loads(before), "dataset": None}))
        report_runs([str(finished / "run"), "--output_file", str(tmp_path / "r.html")])
    finally:
        summary.write_text(before)
    assert all(e["texts"] == [] for e in data_of(tmp_path / "r.html")["examples"])
    assert "does not say which dataset it was trained on" in (tmp_path / "r.html").read_text()
