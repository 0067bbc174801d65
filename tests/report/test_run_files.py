"""What a run leaves behind: files that open, a picture that is one, text that stays text."""

import json

import datasets
import numpy as np
import pytest

from dsel_trl import SelectionCallback
from dsel_trl.core.ledger import Ledger
from dsel_trl.report.picture import draw_run
from dsel_trl.report.record import RunRecord
from dsel_trl.report.run_files import write_run
from tests import tiny

PNG = b"\x89PNG\r\n\x1a\n"
SUMMARY = {"methods": [{"name": "margin"}], "trainer": "DPOTrainer", "steps": 4}


def ledger(size=20, **columns):
    made = Ledger(size)
    for name, values in columns.items():
        made.write(name, None, values, step=1)
    return made


def test_a_run_leaves_its_files(make_trainer, pictures, tmp_path):
    trainer = make_trainer("dpo", max_steps=4, output_dir=tmp_path / "out")
    trainer.add_callback(SelectionCallback(trainer, "random", keep=0.5))
    trainer.train()
    folder = tmp_path / "out" / "selection"
    assert sorted(path.name for path in folder.iterdir()) == [
        "history.json",
        "ledger.parquet",
        "selection.png",
        "summary.json",
    ]
    assert (folder / "selection.png").read_bytes().startswith(PNG)
    table = datasets.Dataset.from_parquet(str(folder / "ledger.parquet")).to_pandas()
    assert table["id"].tolist() == list(range(40))
    assert (table["dropped_by"] == "random").sum() == 20
    assert table["visits"].sum() == 8
    assert ((table["visits"] > 0) == (table["last_step"] >= 0)).all()
    assert table.loc[table["visits"] > 0, ["loss", "implicit_margin"]].notna().all(axis=None)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == 4
    assert summary["examples_trained"] == 8
    assert summary["kept_fraction"] == 0.5
    assert summary["methods"] == [{"name": "random", "keep": 0.5, "refresh": "never"}]
    assert summary["trainer"] == "DPOTrainer"


def test_ids_are_those_of_the_users_dataset(make_trainer):
    """TRL drops pairs whose prompt fills the whole length; the others keep their number."""
    trainer = make_trainer("dpo", max_length=6, max_steps=1)
    kept = len(trainer.train_dataset)
    assert kept < 40
    trainer.add_callback(SelectionCallback(trainer, "uniform"))
    trainer.train()
    file = f"{trainer.args.output_dir}/selection/ledger.parquet"
    ids = datasets.Dataset.from_parquet(file)["id"][:]
    assert len(ids) == kept
    prompts = tiny.preferences()["prompt"]
    assert [prompts[i] for i in ids] == trainer.train_dataset["prompt"][:]


def test_without_matplotlib_there_is_no_picture(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with caplog.at_level("INFO"):
        write_run(tmp_path, ledger(), ids=None, summary=SUMMARY, history=[])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["history.json", "ledger.parquet", "summary.json"]
    assert "dsel-trl[report]" in caplog.text


@pytest.mark.parametrize(
    "columns",
    [
        {},
        {"margin": np.full(20, np.nan)},
        {"margin": np.zeros(20), "weight": np.ones(20)},
        {"margin": np.r_[np.nan, np.inf, -np.inf, np.arange(17.0)], "weight": np.r_[np.nan, -3.0, np.arange(18.0)]},
        {"loss": np.arange(20.0), "weight": np.full(20, np.nan)},
    ],
    ids=["empty", "unknown", "constant", "infinite", "unweighted"],
)
def test_every_ledger_can_be_drawn(tmp_path, columns):
    scored = {"step": 1.0, "margin_q10": 0.0, "margin_q50": 0.5, "margin_q90": 1.0}
    rows = {0: [], 1: [{"step": 1.0, "kept_fraction": 1.0}], 2: [scored, {"step": 2.0, "weighted_loss": 2.0}]}
    draw_run(tmp_path / "selection.png", RunRecord.of(ledger(**columns), SUMMARY, rows[len(columns)]))
    assert (tmp_path / "selection.png").read_bytes().startswith(PNG)
    assert [path.name for path in tmp_path.iterdir()] == ["selection.png"]


def test_names_are_drawn_as_they_are(tmp_path):
    """Signs that a text system would interpret are only text."""
    summary = {**SUMMARY, "methods": [{"name": "m$\\frac{$ <script>"}], "trainer": "$x_{"}
    made = ledger(**{"m$\\frac{$ <script>": np.arange(20.0)})
    draw_run(tmp_path / "selection.png", RunRecord.of(made, summary, []))
    assert (tmp_path / "selection.png").read_bytes().startswith(PNG)


def test_drawing_leaves_pyplot_alone(tmp_path):
    import matplotlib.pyplot as plt

    before = plt.get_backend(), plt.get_fignums()
    draw_run(tmp_path / "selection.png", RunRecord.of(ledger(loss=np.arange(20.0)), SUMMARY, []))
    assert (plt.get_backend(), plt.get_fignums()) == before
