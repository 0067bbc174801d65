"""Stages: several datasets by one command, what is forgotten, and resuming between and within them."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import yaml
from datasets import Dataset
from safetensors.numpy import load_file

import dsel_trl.commands.stages as stages
from dsel_trl.cli import main
from dsel_trl.data.stages import Stream, read_replay, split_by
from tests import tiny

NAMES = ("first", "second", "third")


@pytest.fixture(autouse=True)
def clean_run(tmp_path, monkeypatch):
    """Each test in its own folder; the program's log handler is not kept."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    yield
    logging.getLogger("dsel_trl").handlers.clear()
    logging.getLogger("dsel_trl").propagate = True


@pytest.fixture
def recipe(tmp_path, model):
    """Writes a recipe of three small stages, with changes; returns its path."""
    for seed, name in enumerate(NAMES):
        for split, size in (("train", 8), ("test", 4)):
            folder = tmp_path / name
            folder.mkdir(exist_ok=True)
            rows = tiny.completions(size, seed=10 * seed + (split == "test"))
            rows.to_parquet(str(folder / f"{split}.parquet"))

    def write(**changes):
        values = {
            "stages": [{"dataset_name": str(tmp_path / name)} for name in NAMES],
            "model_name_or_path": str(model),
            "output_dir": str(tmp_path / "out"),
            "max_steps": 3,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "gradient_checkpointing": False,
            "use_cpu": True,
            "save_strategy": "steps",
            "save_steps": 2,
            "disable_tqdm": True,
            "report_to": "none",
            **changes,
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not ...}))
        return str(path)

    return write


def summary(folder):
    return json.loads((Path(folder) / "selection" / "summary.json").read_text())


def trained(folder):
    return load_file(Path(folder) / "model.safetensors")


def assert_same_run(one, two):
    for name, values in trained(one).items():
        np.testing.assert_array_equal(values, trained(two)[name], err_msg=name)
    first, second = summary(one), summary(two)
    for measure in ("loss", "accuracy"):
        assert first[measure] == second[measure]
    assert [s["pool"] for s in first["stages"]] == [s["pool"] for s in second["stages"]]


# ---- What comes out ----


def test_each_stage_is_judged_on_all_stages_so_far(recipe, capsys):
    assert main(["sft", "--config", recipe(selection=[{"name": "uniform"}])]) == 0, capsys.readouterr().err
    said, found = capsys.readouterr().out, summary("out")
    assert [stage["name"] for stage in found["stages"]] == list(NAMES)
    table = np.array([[np.nan if v is None else v for v in row] for row in found["loss"]["table"]])
    assert np.isfinite(table[np.tril_indices(3)]).all()
    assert np.isnan(table[np.triu_indices(3, 1)]).all()
    assert found["loss"]["final_mean"] == pytest.approx(table[2].mean())
    assert found["loss"]["forgetting"] == pytest.approx(
        np.mean([table[2, 0] - table[0, 0], table[2, 1] - table[1, 1]])
    )
    assert set(found) >= {"accuracy", "cost", "seed", "methods"}
    assert "loss after" in said
    assert f"{table[1, 0]:.4f}" in said
    assert all(
        Path("out", f"stage-{k + 1}-{name}", "selection", "ledger.parquet").is_file() for k, name in enumerate(NAMES)
    )
    assert main(["report", "out", "--examples", "0"]) == 0, capsys.readouterr().err
    text = Path("out", "report.html").read_text()
    assert f"<td>{table[1, 0]:.4f}</td>" in text
    assert text.count("<section class='run'>") == len(NAMES)


def test_a_stage_starts_from_the_model_of_the_one_before(recipe, capsys):
    assert main(["sft", "--config", recipe(learning_rate=0.0, weight_decay=0.0)]) == 0, capsys.readouterr().err
    table = summary("out")["loss"]["table"]
    assert table[0][0] == table[1][0] == table[2][0]


def test_a_stage_ends_with_the_step_that_reaches_its_tokens(recipe, tmp_path, capsys):
    wanted = (30, 120, 10_000)
    entries = [
        {"dataset_name": str(tmp_path / name), "max_tokens": tokens}
        for name, tokens in zip(NAMES, wanted, strict=True)
    ]
    assert main(["sft", "--config", recipe(stages=entries, max_steps=12, save_strategy="no")]) == 0
    found = summary("out")["stages"]
    steps, tokens = ([stage[key] for stage in found] for key in ("steps", "tokens"))
    # A step has two rows of at most 8 and 16 words and an end.
    for count, limit in zip(tokens[:2], wanted, strict=False):
        assert limit <= count < limit + 2 * 25
    assert steps[0] < steps[1] < steps[2] == 12
    assert "'third' has ended after" in capsys.readouterr().err


def test_the_rows_of_a_column_are_staged(recipe, tmp_path, capsys):
    for split, size in (("train", 12), ("test", 6)):
        rows = tiny.completions(size, seed=len(split)).add_column(
            "task", [("b", "a", "c")[i % 3] for i in range(size)]
        )
        (tmp_path / "all").mkdir(exist_ok=True)
        rows.to_parquet(str(tmp_path / "all" / f"{split}.parquet"))
    changes = {"stages": {"column": "task"}, "dataset_name": str(tmp_path / "all"), "max_steps": 1}
    assert main(["sft", "--config", recipe(**changes)]) == 0, capsys.readouterr().err
    assert [(stage["name"], stage["pool"]) for stage in summary("out")["stages"]] == [("b", 4), ("a", 4), ("c", 4)]


def test_stages_of_pairs_with_an_adapter(recipe, tmp_path, model, capsys):
    entries = []
    for seed, name in enumerate(NAMES[:2]):
        for split in ("train", "test"):
            (tmp_path / f"pairs-{name}").mkdir(exist_ok=True)
            rows = tiny.preferences(6, seed=10 * seed + (split == "test"))
            rows.to_parquet(str(tmp_path / f"pairs-{name}" / f"{split}.parquet"))
        entries.append({"dataset_name": str(tmp_path / f"pairs-{name}"), "name": name, "max_steps": 2 + seed})
    words = ["dpo", "--config", recipe(stages=entries, selection=[{"name": "random", "keep": 0.5}], use_peft=True)]
    assert main([*words, "--lora_target_modules", "all-linear", "--replay", "0.5"]) == 0, capsys.readouterr().err
    found = summary("out")
    assert [(stage["pool"], stage["steps"]) for stage in found["stages"]] == [(6, 2), (9, 3)]
    # The reference is the policy that the stage began with, so the first stage's accuracy begins anew.
    assert set(found["accuracy"]) == {"table", "final_mean", "forgetting"}
    one, two = (
        load_file(f"out/stage-{k}-{name}/model/adapter_model.safetensors") for k, name in ((1, "first"), (2, "second"))
    )
    assert one.keys() == two.keys()
    assert any((one[key] != two[key]).any() for key in one)


# ---- Resuming ----


PRUNING = {"name": "adapt_inf", "budget": 5, "clusters": 2, "directions": 2, "survive": 6}


@pytest.mark.parametrize(
    ("selection", "limits", "taken_away"),
    [
        ([{"name": "el2n", "keep": 0.5, "refresh": 1}], {}, "checkpoint-3"),
        ([PRUNING], {}, "checkpoint-3"),
        # The checkpoint of its end: there is nothing to go on with behind it.
        ([{"name": "el2n", "keep": 0.5, "refresh": 1}], {}, None),
        ([], {"max_tokens": 50, "max_steps": 9}, None),
    ],
    ids=["live", "pruning", "at its end", "at its last token"],
)
def test_a_run_that_was_cut_off_between_and_within_stages_ends_the_same(
    recipe, tmp_path, capsys, monkeypatch, selection, limits, taken_away
):
    entries = [{"dataset_name": str(tmp_path / name), **limits} for name in NAMES]
    path = recipe(stages=entries, selection=selection, replay="all", save_steps=1 if "max_tokens" in limits else 2)
    assert main(["sft", "--config", path]) == 0, capsys.readouterr().err
    words = ["sft", "--config", path, "--output_dir", str(tmp_path / "cut")]
    judge, calls = stages._judge, []

    def cut_before_it_is_judged(trainer, names):
        calls.append(len(names))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return judge(trainer, names)

    with monkeypatch.context() as patch:
        patch.setattr(stages, "_judge", cut_before_it_is_judged)
        assert main(words) == 130
    # The first stage is done; the second has its checkpoint of step 2 and one of its end, which we take away.
    assert (tmp_path / "cut" / "stage-1-first" / "stage.json").is_file()
    second = tmp_path / "cut" / "stage-2-second"
    if taken_away is not None:
        (second / taken_away / "trainer_state.json").unlink()
    assert main(words) == 2
    assert "--resume_from_checkpoint" in capsys.readouterr().err
    assert main([*words, "--resume_from_checkpoint", "true"]) == 0, capsys.readouterr().err
    assert_same_run(tmp_path / "out", tmp_path / "cut")
    if selection == [PRUNING]:
        # Of 8 rows 6 stay for the second stage, whose pool of 14 is cut to 6 again.
        found = summary("out")["stages"]
        assert [(stage["pool"], stage["dropped_for_good"]) for stage in found] == [(8, 2), (14, 8), (14, 8)]
        # A score of three pass values, two forwards along each of two directions, and the states of the last cut.
        assert [stage["cost"]["forwards"] for stage in found] == [6 * stage["pool"] for stage in found]


def test_a_finished_stage_of_another_run_is_not_taken(recipe, capsys):
    path = recipe(max_steps=1)
    assert main(["sft", "--config", path]) == 0, capsys.readouterr().err
    assert main(["sft", "--config", path, "--seed", "5", "--resume_from_checkpoint", "true"]) == 2
    assert "was trained by another run" in capsys.readouterr().err


# ---- Mistakes ----


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"stages": [{"dataset_name": "first", "max_step": 3}]}, ["'max_step'", "'max_steps'"]),
        ({"stages": [{"name": "first"}]}, ["dataset_name"]),
        ({"stages": [{"dataset_name": "first"}]}, ["at least two"]),
        ({"stages": [{"dataset_name": "first"}, {"dataset_name": "first"}]}, ["called 'first'"]),
        ({"stages": [{"dataset_name": "first", "max_tokens": 0}]}, ["max_tokens=0"]),
        ({"stages": {"col": "task"}}, ["{column: NAME}"]),
        ({"stages": {"column": "tsk"}, "dataset_name": "first"}, ["'tsk'", "difficulty"]),
        ({"replay": "some"}, ["replay='some'", "'all'"]),
        ({"replay": -1.0}, ["replay='-1.0'"]),
        ({"stages": ..., "dataset_name": "first", "replay": "all"}, ["replay='all'", "none"]),
        ({"dataset_name": "first"}, ["`stages`", "dataset_name"]),
        ({"compare": ["stock"]}, ["'compare'", "dsel ablate"]),
        ({"selection": [{"name": "margin"}]}, ["'margin'", "dsel sft"]),
    ],
)
def test_mistakes_show_before_anything_is_written(recipe, capsys, changes, said):
    assert main(["sft", "--config", recipe(**changes)]) == 2
    line = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("dsel: error:"))
    assert all(part in line for part in said), line
    assert not Path("out").exists()


# ---- The stream ----


def stream():
    return Stream.of(
        ["a", "b"], [Dataset.from_dict({"x": [0, 1, 2, 3], "y": [0] * 4}), Dataset.from_dict({"x": [4, 5]})]
    )


def test_a_stream_has_what_its_stages_have_in_common():
    joined = stream()
    assert joined.rows.column_names == ["x", "stage"]
    assert joined.rows["stage"][:] == ["a"] * 4 + ["b"] * 2
    with pytest.raises(ValueError, match=r"column 'x' holds .*string.* in 'b'"):
        Stream.of(["a", "b"], [Dataset.from_dict({"x": [0]}), Dataset.from_dict({"x": ["s"]})])


def test_what_is_dropped_for_good_does_not_come_again():
    joined, rng = stream(), np.random.default_rng(0)
    assert joined.pool(0, "all", rng).tolist() == [0, 1, 2, 3]
    joined.drop(np.array([1]))
    assert joined.pool(1, "all", rng).tolist() == [0, 2, 3, 4, 5]
    assert joined.pool(1, 0.0, rng).tolist() == [4, 5]
    assert {len(joined.pool(1, 0.5, rng)) for _ in range(5)} == {3}
    assert all(1 not in joined.pool(1, 1.0, rng) for _ in range(20))
    assert joined.pool(1, 9.0, rng).tolist() == [0, 2, 3, 4, 5]


def test_numbers_are_staged_in_their_order_and_texts_in_that_of_their_rows():
    rows = Dataset.from_dict({"n": [2, 1, 2], "t": ["z", "a", "z"], "gap": ["a", None, "b"]})
    assert {name: part["t"][:] for name, part in split_by(rows, "n").items()} == {"1": ["a"], "2": ["z", "z"]}
    assert list(split_by(rows, "n")) == ["1", "2"]
    assert list(split_by(rows, "t")) == ["z", "a"]
    with pytest.raises(ValueError, match="column 'gap' is empty in row 1"):
        split_by(rows, "gap")


@pytest.mark.parametrize(("given", "read"), [("all", "all"), ("0", 0.0), (0.5, 0.5), ("2", 2.0)])
def test_replay_is_a_number_or_all(given, read):
    assert read_replay(given) == read
