"""`dsel ablate`: what it takes, what it shares, what it does with cells that fail; its table is the same twice."""

# Cells run in processes of their own in `test_ablate_processes.py`.

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from dsel_trl.cli import main
from dsel_trl.commands.ablation_cells import Cell
from dsel_trl.commands.ablation_results import TRIES, Results, equal_steps, steps_off
from dsel_trl.commands.wrong_labels import flip_labels
from dsel_trl.data.demo.corpus import demo_preferences
from dsel_trl.data.demo.model import build_demo_model
from dsel_trl.report.ablation import Row, markdown, summary_of, write_tables
from tests import tiny

ROOT = Path(__file__).parents[2]


def rows_of(folder):
    return {(row["variant"], row["flip"]): row for row in json.loads((folder / "ablation.json").read_text())["rows"]}


METHODS = {"explicit": {"name": "margin", "source": "explicit", "keep": 2 / 3}}


def test_a_table_of_stock_methods_and_random_is_the_same_twice(base, in_process, tmp_path, capsys):
    out = tmp_path / "out"
    path = base({"seeds": [0, 1], "methods": {**METHODS, "bad": {"name": "weight_column", "column": "no"}}})
    assert main(["ablate", "--config", path]) == 1
    captured = capsys.readouterr()
    assert "'no'" in captured.err
    assert "bad, seed 0" in captured.err
    assert "(failed: 0, 1)" in captured.out
    rows = rows_of(out)
    assert list(rows) == [("stock", None), ("explicit", None), ("bad", None), ("random keep=0.667", None)]
    explicit, stock = rows["explicit", None], rows["stock", None]
    assert (explicit["flipped_dropped"], explicit["clean_dropped"]) == (1.0, 0.0)
    assert {row["steps"] for row in rows.values() if row["seeds"]} == {3.0}
    assert stock["selected_fraction"] == stock["compute"] == stock["improvement_ratio"] == 1.0
    assert explicit["against_stock"] == pytest.approx(explicit["mean"] - stock["mean"])
    assert explicit["against_random_low"] <= explicit["against_random"] <= explicit["against_random_high"]
    assert rows["bad", None]["mean"] is None
    tables = {name: (out / f"ablation.{name}").read_bytes() for name in ("md", "csv", "json")}
    assert b"econds" not in b"".join(tables.values())
    # Finished cells are not trained again; those that failed are, and one that was lost.
    done = list(in_process)
    lost = next(out.glob("cells/explicit-seed1-*"))
    shutil.rmtree(lost)
    in_process.clear()
    assert main(["ablate", "--config", path]) == 1
    assert sorted(in_process) == sorted([lost.name, *(name for name in done if name.startswith("bad"))])
    assert tables == {name: (out / f"ablation.{name}").read_bytes() for name in tables}


def test_scores_without_a_seed_are_measured_once_and_charged_to_each(base, in_process, tmp_path, monkeypatch):
    from dsel_trl.methods.text.perplexity import Perplexity

    calls, measure = [], Perplexity.measure
    monkeypatch.setattr(Perplexity, "measure", lambda self, run: calls.append(run.seed) or measure(self, run))
    file = str(tmp_path / "texts.parquet")
    tiny.completions(24).to_parquet(file)
    block = {"trainer": "sft", "seeds": [0, 1], "methods": ["perplexity"], "random": False}
    path = base(block, dataset_name=file, eval_dataset_name=file)
    assert main(["ablate", "--config", path]) == 0
    assert calls == [0]
    cells = [
        c for c in json.loads((tmp_path / "out" / "ablation.json").read_text())["cells"] if c["variant"] != "stock"
    ]
    assert cells[0]["cost"] == cells[1]["cost"]
    assert cells[0]["cost"]["forwards"] == 24
    assert cells[0]["selection_flops_at_start"] == cells[0]["selection_flops"] > 0


def test_wrong_labels_and_shares_are_axes(base, in_process, tmp_path):
    path = base({"seeds": [3], "methods": METHODS, "flip": [0, 0.5]})
    before = (tmp_path / "pairs.parquet").read_bytes()
    words = ["--keep", "0.5", "--no_random", "--methods", "{explicit: {name: margin, source: explicit}}"]
    assert main(["ablate", "--config", path, *words]) == 0
    assert list(rows_of(tmp_path / "out")) == [
        ("stock", 0.0), ("explicit keep=0.5", 0.0), ("stock", 0.5), ("explicit keep=0.5", 0.5),
    ]  # fmt: skip
    assert (tmp_path / "pairs.parquet").read_bytes() == before


@pytest.fixture
def demo(tmp_path):
    """A part of the demo corpus, with a judge's scores and pairs of many lengths."""
    corpus = demo_preferences(0, train_size=48, test_size=16)
    for split in corpus:
        corpus[split].to_parquet(str(tmp_path / "demo" / f"{split}.parquet"))
    model = str(build_demo_model(tmp_path / "demo-model", steps=2))
    data = {"dataset_name": str(tmp_path / "demo"), "eval_dataset_name": None}
    return {**data, "model_name_or_path": model, "max_steps": 12}


@pytest.mark.usefixtures("no_picture")
@pytest.mark.parametrize("equal", ["tokens", "flops"])
def test_what_is_said_to_be_equal_is_so_to_a_step(base, in_process, demo, tmp_path, equal):
    """Short pairs first, a choice among candidates, and a helper: less or more of both than stock takes."""
    methods = {
        "short": {"name": "length_curriculum", "keep": 0.3},
        "jest": {"name": "select_k_of_b", "factor": 2},
        "helped": {"name": "rho_loss", "factor": 2, "helper_epochs": 0.1, "helper_lora": False},
    }
    if equal == "flops":
        methods |= {"dear": {"name": "rho_loss", "factor": 2, "helper_epochs": 2, "helper_lora": False}}
    path = base({"seeds": [0], "methods": methods, "equal": equal}, **demo)
    assert main(["ablate", "--config", path]) == (1 if equal == "flops" else 0)
    found = json.loads((tmp_path / "out" / "ablation.json").read_text())
    cells = {cell["variant"]: cell for cell in found["cells"]}
    assert {"stock", "short", "jest", "helped"} < set(cells)
    stock = cells.pop("stock")
    parameters = stock["training_flops"] / (8 * stock["tokens"])
    for name, cell in cells.items():
        costs = cell["cost"]
        # Of each token 2 operations forwards and 4 backwards per parameter, and 2 of the reference, as training has.
        selection = {
            "helper_forward_tokens": 2, "forward_tokens": 2, "reference_forward_tokens": 2,
            "helper_reference_forward_tokens": 2, "helper_backward_tokens": 4,
        }  # fmt: skip
        assert {key for key in costs if key.endswith("_tokens")} <= set(selection)
        added = sum(often * costs.get(key, 0) for key, often in selection.items()) * parameters
        assert cell["selection_flops"] == pytest.approx(added)
        assert cell["training_flops"] == pytest.approx(8 * cell["tokens"] * parameters)
        spent, of_stock, start = cell["tokens"], stock["tokens"], 0
        if equal == "flops":
            spent, of_stock = cell["training_flops"] + added, stock["training_flops"]
            start = cell["selection_flops_at_start"]
        assert abs(spent - of_stock) <= (spent - start) / cell["steps"], name
        assert cell["steps_off"] == pytest.approx((spent - of_stock) / ((spent - start) / cell["steps"]), abs=1e-3)
    assert cells["short"]["steps"] > stock["steps"]
    assert cells["helped"]["cost"]["helper_backward_tokens"] > 0
    if equal == "flops":
        assert cells["jest"]["cost"]["forward_tokens"] > 0
        assert cells["jest"]["steps"] < stock["steps"]
        assert 0 < cells["helped"]["selection_flops_at_start"] < stock["training_flops"]
        assert "nothing is left to train with" in found["failures"]["dear, seed 0"]
        assert "dear" not in cells


def test_steps_of_uneven_size_are_looked_for_until_they_fit():
    """The later steps are ten times as long: no step is what the first ones let expect."""
    sizes = np.r_[np.full(6, 10), np.full(60, 100)]
    ran = []

    class Counting(Results):
        def run(self, cells, what):
            for cell in cells:
                ran.append(cell.steps)
                tokens = int(sizes[: cell.steps].sum())
                self.found[cell.variant, None, cell.seed] = {"steps": cell.steps, "tokens": tokens}

    results = Counting(None, Path())
    results.found["stock", None, 0] = {"steps": 5, "tokens": 700}
    cell = Cell("dpo", "a", [], 0, None, None, {}, [], "", [], 1)
    results.run_at_equal([cell], "tokens", "methods")
    assert results.found["a", None, 0]["tokens"] == 660
    assert results.found["a", None, 0]["steps_off"] == pytest.approx((660 - 700) / (660 / 12), abs=1e-3)
    assert len(ran) == len(set(ran)) <= TRIES


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--methods", "margn"], "'margn'"),
        (["--methods", "margin", "--seeds", "0,x"], "seeds='0,x'"),
        (["--methods", "margin", "--equal", "time"], "'time'"),
        (["--methods", "margin", "--flip", "1.5"], "flip=[1.5]"),
        (["--methods", "margin", "--workers", "0"], "workers=0"),
        (["--methods", "rho1"], "'rho1'"),
        (["--methods", "{stock: {name: margin}}"], "'stock'"),
        (["--methods", "margin", "--learning_rte", "1"], "'--learning_rte'"),
        ([], "Which methods?"),
    ],
)
def test_mistakes_show_before_anything_is_written(base, tmp_path, capsys, words, said):
    assert main(["ablate", "--config", base({}), *words]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_unknown_key_of_the_block(base, capsys):
    assert main(["ablate", "--config", base({"sedes": [1]})]) == 2
    assert "'sedes'" in capsys.readouterr().err


# ---- Its parts ----

STOCK = {"steps": 100, "tokens": 1000, "training_flops": 6000.0}


def test_steps_that_make_something_else_equal():
    result = {"steps": 100, "tokens": 500, "training_flops": 3000.0, "selection_flops": 1500.0,
              "selection_flops_at_start": 1000.0}  # fmt: skip
    assert equal_steps(result, STOCK, "tokens") == 200
    # Of 6,000 operations 1,000 are spent at the start; a step takes 30 and half as much again for its part of 500.
    assert equal_steps(result, STOCK, "flops") == round(5000 / 35)
    assert steps_off({**result, "steps": 200, "tokens": 1005}, STOCK, "tokens") == pytest.approx(5 / 5.025)
    with pytest.raises(ValueError, match=r"1\.5 times what the whole stock training does"):
        equal_steps({**result, "selection_flops_at_start": 9000.0}, STOCK, "flops")


def test_turned_labels():
    rows = Dataset.from_dict({
        "prompt": [f"p{i}" for i in range(10)], "chosen": [f"c{i}" for i in range(10)],
        "rejected": [f"r{i}" for i in range(10)], "score_chosen": [float(i) for i in range(10)],
        "score_rejected": [-1.0] * 10, "truth_flipped": [i == 4 for i in range(10)],
    })  # fmt: skip
    right = flip_labels(rows, 0.0)
    assert right["chosen"][:] == [f"{'r' if i == 4 else 'c'}{i}" for i in range(10)]
    assert right["score_rejected"][4] == 4.0
    assert not any(right["truth_flipped"])
    some, more = flip_labels(rows, 0.3), flip_labels(rows, 0.6)
    assert (sum(some["truth_flipped"]), sum(more["truth_flipped"])) == (3, 6)
    assert all(b for a, b in zip(some["truth_flipped"], more["truth_flipped"], strict=True) if a)
    for i in np.flatnonzero(some["truth_flipped"]):
        assert (some["chosen"][i], some["rejected"][i]) == (right["rejected"][i], right["chosen"][i])
        assert some["score_chosen"][i] == right["score_rejected"][i]
    assert rows["chosen"][:] == [f"c{i}" for i in range(10)]
    with pytest.raises(ValueError, match="flip=2"):
        flip_labels(rows, 2)
    with pytest.raises(ValueError, match="needs the columns"):
        flip_labels(rows.remove_columns(["rejected"]), 0.1)


def result(seed, metric, **values):
    return {"seed": seed, "metric": metric, "variant": "x", "flip": None, "kept_fraction": 0.5,
            "selected_fraction": 0.5, "steps": 10, "tokens": 100, "training_flops": 600.0, "selection_flops": 60.0,
            "cost": {"forward_tokens": 30}, "simplicity_penalty": 0.0, "flexibility_penalty": 0, **values}  # fmt: skip


def test_selections_are_compared_by_the_measures_of_the_survey():
    dear = {"simplicity_penalty": 2.0, "flexibility_penalty": 1}
    rows = [
        Row("stock", None, [result(0, 0.5, selected_fraction=1.0)], []),
        Row("m", None, [result(0, 0.6), result(1, 0.7)], []),
        Row("dear", None, [result(0, 0.4, **dear)], []),
    ]
    stock, good, dear = summary_of(rows)
    assert (stock["improvement_ratio"], stock["selected_fraction"]) == (1.0, 1.0)
    assert (good["improvement_ratio"], good["selected_fraction"]) == (pytest.approx(1.3), 0.5)
    assert dear["improvement_ratio"] == pytest.approx(0.8)
    assert good["efficiency_rank"] < dear["efficiency_rank"]
    assert good["feasibility_rank"] < dear["feasibility_rank"]


def test_differences_are_those_of_the_same_seed(tmp_path):
    rows = [
        Row("stock", None, [result(0, 0.5), result(1, 0.7), result(2, 0.1)], []),
        Row("m", None, [result(1, 0.8), result(0, 0.6)], [2], "random keep=0.5"),
        Row("random keep=0.5", None, [result(0, 0.6), result(1, 0.6)], []),
    ]
    found = summary_of(rows)
    assert found[1]["against_stock"] == pytest.approx(0.1)
    assert found[1]["against_stock_low"] == pytest.approx(0.1)
    assert found[1]["against_random"] == pytest.approx(0.1)
    assert (found[1]["against_random_low"], found[1]["against_random_high"]) == pytest.approx((0.0, 0.2))
    assert np.isnan(found[0]["against_stock"])
    assert found[1]["compute"] == pytest.approx(1.1)
    assert found[1]["scored_tokens"] == 30
    assert "2 (failed: 2)" in markdown(rows, "accuracy")
    files = write_tables(tmp_path, rows, "accuracy", {"m, seed 2": "why"})
    assert [file.name for file in files] == ["ablation.md", "ablation.csv", "ablation.json", "ablation.png"]
    assert json.loads((tmp_path / "ablation.json").read_text())["failures"] == {"m, seed 2": "why"}
