"""The command line: what it accepts, what it says of mistakes before anything is written, and its exit codes."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from datasets import Dataset

from dsel_trl import list_methods
from dsel_trl.cli import main
from dsel_trl.commands.arguments import check_arguments, parse_arguments, read_selection
from tests import tiny


@pytest.fixture(autouse=True)
def clean_run(tmp_path, monkeypatch):
    """Each test in its own folder; the program's log handler is not kept."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DSEL_DEBUG", raising=False)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    yield
    logging.getLogger("dsel_trl").handlers.clear()
    logging.getLogger("dsel_trl").propagate = True


@pytest.fixture
def pairs(tmp_path):
    """A file of 24 tiny preference pairs, of which every third label is known to be flipped."""
    rows = tiny.preferences(24)
    rows = rows.add_column("truth_flipped", [row % 3 == 0 for row in range(24)])
    margins = {"score_chosen": [float(row % 3) for row in range(24)], "score_rejected": [0.5] * 24}
    for name, values in margins.items():
        if name in rows.column_names:
            rows = rows.remove_columns(name)
        rows = rows.add_column(name, values)
    rows.to_parquet(tmp_path / "pairs.parquet")
    return tmp_path / "pairs.parquet"


@pytest.fixture
def recipe(tmp_path, pairs, model):
    """Writes a recipe of two quick steps, with changes; returns its path."""

    def write(**changes):
        values = {
            "dataset_name": str(pairs),
            "model_name_or_path": str(model),
            "output_dir": str(tmp_path / "out"),
            "selection": [{"name": "random", "keep": 0.5}],
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 8,
            "learning_rate": 1e-3,
            "gradient_checkpointing": False,
            "use_cpu": True,
            "save_strategy": "no",
            "disable_tqdm": True,
            **changes,
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not ...}))
        return str(path)

    return write


def error_of(capsys, words):
    """The one line a mistake is answered with."""
    assert main(words) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("dsel: error:")]
    assert len(lines) == 1, captured.err
    assert "Traceback" not in captured.err
    return lines[0]


# ---- Mistakes ----


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["dpoo"], ["'dpoo'", "'dpo'"]),
        (["methods", "margn"], ["'margn'", "'margin'"]),
        (["methods", "--jsn"], ["--jsn"]),
        (["dpo"], ["model_name_or_path is missing"]),
        (["dpo", "--config"], ["--config needs the path"]),
        (["dpo", "--config", "nowhere.yaml"], ["'nowhere.yaml'"]),
        (["dpo", "recipe.yaml"], ["'recipe.yaml'", "--config recipe.yaml"]),
        (["dpo", "--learning_rte", "1e-3"], ["'--learning_rte'", "'--learning_rate'"]),
        (["dpo", "--learning_rat", "1e-3"], ["'--learning_rat'", "'--learning_rate'"]),
        (["dpo", "--max_steps", "many"], ["max_steps", "many"]),
        (["dpo", "--selection", "[{name: random"], ["--selection, line 1"]),
        (["dpo", "--resume_from_checkpoint", "out/checkpoint-3"], ["'out/checkpoint-3'"]),
    ],
)
def test_mistyped_words(capsys, words, said):
    line = error_of(capsys, words)
    assert all(part in line for part in said), line


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- a\n- b\n", ["must hold a YAML mapping"]),
        ("", ["must hold a YAML mapping"]),
        ("max_steps: 3\n  beta: [\n", ["recipe.yaml, line 2"]),
        ("max_steps: 3\nmax_steps: 4\n", ["'max_steps' is given twice", "line 2"]),
        ("env: [A]\n", ["`env`"]),
        ("selecton: []\n", ["'selecton'", "'selection'"]),
        ("truncation_mode: keep_strat\n", ["'keep_strat'", "'keep_start'"]),
        ("seed: 1.5\n", ["seed", "1.5"]),
        ("use_cpu: perhaps\n", ["perhaps"]),
    ],
)
def test_mistakes_in_the_file(capsys, tmp_path, text, said):
    (tmp_path / "recipe.yaml").write_text(text)
    line = error_of(capsys, ["dpo", "--config", "recipe.yaml"])
    assert all(part in line for part in said), line


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"selection": [{"name": "alignment_potentail"}]}, ["'alignment_potentail'", "'alignment_potential'"]),
        ({"selection": [{"name": "random", "keeep": 0.5}]}, ["'keeep'", "'keep'"]),
        ({"selection": [{"name": "random", "keep": 0}]}, ["keep=0"]),
        ({"selection": [{"name": "random", "keep": 1.4}]}, ["keep=1.4"]),
        ({"selection": ["random"]}, ["mapping with a `name`", "'random'"]),
        ({"selection": [{"keep": 0.5}]}, ["mapping with a `name`"]),
        ({"selection": [{"name": "margin", "action": "curriculum"}, {"name": "length_curriculum"}]}, ["order"]),
        ({"selection": [{"name": "weight_column", "column": "wieght"}]}, ["'wieght'"]),
        ({"selection": [{"name": "margin", "source": "explicit", "score_chosen_column": "truth_flipped"}]}, ["truth"]),
        ({"loss_type": "aot", "selection": [{"name": "robust_dpo"}]}, ["aot"]),
        ({"dataset_name": ...}, ["dataset_name is missing"]),
        ({"dataset_name": "nowhere/pairs.parquet"}, ["'nowhere/pairs.parquet'"]),
        ({"dataset_train_split": "trian"}, ["'trian'", "'train'"]),
        ({"eval_strategy": "steps"}, ["no split 'test'", "--eval_dataset_name"]),
        ({"compare": ["stock", "selection"]}, ["'compare'"]),
        ({"model_name_or_path": "./nowhere"}, ["'./nowhere'"]),
        ({"model_name_or_path": "."}, ["holds no model"]),
        ({"trust_remote_code": True}, ["trust_remote_code"]),
        ({"datasets": [{"path": "parquet"}]}, ["Both `dataset_name` and `datasets`"]),
        ({"dataset_name": ..., "datasets": [{"pth": "parquet"}]}, ["pth"]),
        ({"per_device_train_batch_size": 64, "dataloader_drop_last": True}, ["fewer than one batch of 64", "no step"]),
    ],
)
def test_mistakes_in_a_recipe_write_nothing(capsys, recipe, tmp_path, changes, said):
    line = error_of(capsys, ["dpo", "--config", recipe(**changes)])
    assert all(part in line for part in said), line
    assert not (tmp_path / "out").exists()


def test_wrong_columns_for_the_trainer(capsys, recipe):
    line = error_of(capsys, ["sft", "--config", recipe(selection=...)])
    assert "'prompt' and 'completion'" in line
    assert "'chosen'" in line


def test_a_method_of_the_other_trainer(capsys, recipe, tmp_path):
    tiny.completions(8).to_parquet(tmp_path / "texts.parquet")
    words = ["sft", "--config", recipe(dataset_name=str(tmp_path / "texts.parquet"), selection=[{"name": "margin"}])]
    assert "'margin' works with ['dpo', 'kto', 'reward'], not with `dsel sft`" in error_of(capsys, words)


def test_an_earlier_checkpoint_is_not_overwritten(capsys, recipe, tmp_path):
    checkpoint = tmp_path / "out" / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    (checkpoint / "model.safetensors").write_text("precious")
    line = error_of(capsys, ["dpo", "--config", recipe(save_strategy="steps", save_steps=2)])
    assert "checkpoint-2" in line
    assert "--resume_from_checkpoint true" in line
    assert (checkpoint / "model.safetensors").read_text() == "precious"


def test_text_from_outside_cannot_steer_the_terminal(capsys):
    line = error_of(capsys, ["dpo", "--config", "evil\x1b[2J\n.yaml"])
    assert "\x1b" not in line


def test_tracebacks_only_when_asked_for(capsys, monkeypatch):
    assert main(["--debug", "dpo", "--config", "nowhere.yaml"]) == 2
    assert "Traceback" in capsys.readouterr().err
    assert main(["dpo", "--config", "nowhere.yaml", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv("DSEL_DEBUG", "1")
    assert main(["dpo", "--config", "nowhere.yaml"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_other_processes_are_silent(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert main(["dpo", "--config", "nowhere.yaml"]) == 2
    assert main(["methods"]) == 0
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


# ---- Reading ----


def test_file_and_command_line(tmp_path, monkeypatch):
    monkeypatch.delenv("DSEL_TEST_WORD", raising=False)
    (tmp_path / "recipe.yaml").write_text(
        "env: {DSEL_TEST_WORD: 3}\nlearning_rate: 1e-4\neval_strategy: no\nloss_type: [hinge]\nbeta: 0.3\n"
        "fp16: false\nselection:\n  name: robust_dpo\n  eps: 1e-1\n"
    )
    parsed = parse_arguments("dpo", ["--config=recipe.yaml", "--beta", "0.2"])
    assert os.environ["DSEL_TEST_WORD"] == "3"
    monkeypatch.delenv("DSEL_TEST_WORD")
    assert (parsed.training.learning_rate, parsed.training.beta, parsed.training.loss_type) == (1e-4, 0.2, ["hinge"])
    assert parsed.training.eval_strategy == "no"
    assert parsed.selection == [{"name": "robust_dpo", "eps": 0.1}]
    overridden = parse_arguments("dpo", ["--config", "recipe.yaml", "--selection", '[{"name": "random"}]'])
    assert overridden.selection == [{"name": "random"}]
    monkeypatch.delenv("DSEL_TEST_WORD")


def test_nothing_given_is_a_stock_run():
    assert read_selection(None) == read_selection("") == read_selection("[]") == []


@pytest.mark.parametrize(
    ("words", "supported", "expected", "noted"),
    [
        ([], False, False, True),
        ([], True, True, False),
        (["--use_cpu"], True, False, True),
        (["--bf16", "true", "--use_cpu"], False, True, False),
        (["--bf16", "false"], True, False, False),
    ],
)
def test_bfloat16_only_where_there_is_some(monkeypatch, words, supported, expected, noted):
    monkeypatch.setattr("dsel_trl.commands.arguments.is_torch_bf16_gpu_available", lambda: supported)
    # transformers asks for itself whether bf16 can be had.
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: supported)
    parsed = parse_arguments("dpo", words)
    assert parsed.training.bf16 is expected
    assert bool(parsed.notes) is noted


@pytest.mark.parametrize(
    ("given", "expected"), [("true", True), ("True", True), ("false", None), ("no", None), ("here", "here")]
)
def test_resume_from_checkpoint(tmp_path, given, expected):
    (tmp_path / "here").mkdir()
    assert parse_arguments("dpo", ["--resume_from_checkpoint", given]).training.resume_from_checkpoint == expected


# ---- What it prints ----


def test_methods(capsys):
    assert main(["methods"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list_methods()
    assert main(["methods", "margin"]) == 0
    card = capsys.readouterr().out
    assert "score_chosen_column" in card
    assert "trainers:" in card
    assert main(["methods", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert list(rows) == list_methods()
    assert rows["random"]["trainers"] == ["dpo", "sft", "kto", "reward"]
    assert rows["random"]["hooks"] == ["select"]
    assert rows["random"]["summary"].endswith(".")


def test_help_shows_both_trl_and_our_arguments(capsys):
    assert main([]) == 0
    assert "dpo" in capsys.readouterr().out
    assert main(["dpo", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(option in text for option in ("--selection", "--log_by", "--beta", "--use_peft", "--config"))


# ---- Runs ----


def test_dpo_trains_and_leaves_model_and_ledger(capsys, recipe, tmp_path):
    assert main(["dpo", "--config", recipe(use_peft=True, lora_r=2)]) == 0
    out = tmp_path / "out"
    assert (out / "adapter_config.json").is_file()
    ledger = Dataset.from_parquet(str(out / "selection" / "ledger.parquet"))
    assert sorted(ledger["id"]) == list(range(24))
    assert sum(ledger["visits"]) == 8
    assert f"Ledger: {out / 'selection' / 'ledger.parquet'}" in capsys.readouterr().err


def test_sft_trains_with_an_evaluation_file(recipe, tmp_path):
    tiny.completions(16).to_json(tmp_path / "train.jsonl")
    tiny.completions(8, seed=1).to_json(tmp_path / "held_out.jsonl")
    words = ["--dataset_name", "train.jsonl", "--eval_dataset_name", "held_out.jsonl", "--eval_strategy", "steps"]
    assert main(["sft", "--config", recipe(eval_steps=1), *words]) == 0
    assert (tmp_path / "out" / "config.json").is_file()


def test_kto_trains_on_labels_and_on_pairs(capsys, recipe, tmp_path, pairs):
    tiny.judged(16).to_json(tmp_path / "train.jsonl")
    selection = [{"name": "margin", "action": "keep_bottom"}]
    for out, data in (("labels", "train.jsonl"), ("pairs", str(pairs))):
        words = ["--dataset_name", data, "--output_dir", out]
        assert main(["kto", "--config", recipe(selection=selection), *words]) == 0
        assert len(Dataset.from_parquet(f"{out}/selection/ledger.parquet")) == {"labels": 16, "pairs": 48}[out]
    line = error_of(capsys, ["kto", "--config", recipe(selection=[{"name": "wpo"}], output_dir="wpo")])
    assert "'wpo' works with ['dpo'], not with `dsel kto`" in line
    tiny.completions(16).to_json(tmp_path / "unlabelled.jsonl")
    words = ["--dataset_name", "unlabelled.jsonl", "--output_dir", "unlabelled"]
    assert "'completion' and 'label', or 'chosen' and 'rejected'" in error_of(
        capsys, ["kto", "--config", recipe(), *words]
    )


def test_a_stream_trains_with_a_method_that_only_weighs(recipe, tmp_path):
    assert main(["dpo", "--config", recipe(dataset_streaming=True, selection={"name": "robust_dpo"})]) == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_run_is_continued_and_another_method_cannot_continue_it(capsys, recipe, tmp_path):
    words = ["dpo", "--config", recipe(save_strategy="steps", save_steps=1, save_total_limit=2)]
    assert main(words) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out" / "checkpoint-2").rglob("*") if path.is_file()}
    capsys.readouterr()
    other = [*words, "--resume_from_checkpoint", "true", "--selection", "[{name: random, keep: 0.75}]"]
    assert "checkpoint-2 does not belong to this run" in error_of(capsys, other)
    assert before == {path: path.read_bytes() for path in before}
    assert main([*words, "--resume_from_checkpoint", "true", "--max_steps", "4"]) == 0
    assert json.loads((tmp_path / "out" / "selection" / "summary.json").read_text())["steps"] == 4


def test_a_failure_in_training_is_exit_code_1(capsys, recipe, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("out of luck")

    monkeypatch.setattr("trl.DPOTrainer.training_step", fail)
    assert main(["dpo", "--config", recipe()]) == 1
    error = capsys.readouterr().err
    assert "dsel: training failed: RuntimeError: out of luck" in error
    assert "Traceback" not in error


def test_control_c_is_exit_code_130(capsys, recipe, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("trl.DPOTrainer.training_step", interrupt)
    assert main(["dpo", "--config", recipe()]) == 130
    assert "dsel: interrupted" in capsys.readouterr().err


def test_exit_code_of_the_program():
    words = [sys.executable, "-m", "dsel_trl", "nonsense"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("dsel: error: Unknown command 'nonsense'.")


def test_two_processes_print_once(recipe, tmp_path):
    words = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d", "--rdzv_endpoint",
             "localhost:0", "-m", "dsel_trl", "dpo", "--config", recipe(selection=[{"name": "uniform"}])]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("dsel: Ledger:") == 1
    ledger = Dataset.from_parquet(str(tmp_path / "out" / "selection" / "ledger.parquet"))
    assert sum(ledger["visits"]) == 2 * 2 * 4


# ---- Recipes ----

RECIPES = Path(__file__).parents[1] / "recipes"


@pytest.mark.parametrize("path", sorted((RECIPES / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_configs_are_what_accelerate_reads(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    kind = {"single_gpu": "NO", "fsdp2": "FSDP", "deepspeed_zero2": "DEEPSPEED", "deepspeed_zero3": "DEEPSPEED"}
    assert config.distributed_type == kind.get(path.stem, "MULTI_GPU")
    assert f"recipes/accelerate/{path.name}" in path.read_text()


def test_the_quickstart_is_on_the_demo():
    parsed = parse_arguments("dpo", ["--config", str(RECIPES / "quickstart.yaml")])
    assert (parsed.script.dataset_name, parsed.model.model_name_or_path) == ("demo", "demo")
    assert [entry["name"] for entry in parsed.selection] == ["margin"]
    assert parsed.training.use_cpu


def test_a_reader_that_has_seen_enough():
    command = [sys.executable, "-m", "dsel_trl", "methods"]
    listing = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    listing.stdout.close()
    assert "Broken pipe" not in listing.stderr.read()
    assert listing.wait() == 0


def test_processes_that_would_train_alone(monkeypatch, recipe):
    arguments = parse_arguments("dpo", ["--config", recipe()])
    check_arguments(arguments)
    # A launch of two in which, as on a machine without accelerators, no group was formed.
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ValueError, match=r"2 processes were launched.*use_cpu: true"):
        check_arguments(arguments)


def test_any_process_can_fail_alone(monkeypatch, recipe, capsys):
    def fail(job):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("dsel_trl.commands.train.run_single", fail)
    monkeypatch.setenv("RANK", "1")
    assert main(["dpo", "--config", recipe()]) == 1
    assert "dsel, process 1: failed: RuntimeError: out of memory" in capsys.readouterr().err
