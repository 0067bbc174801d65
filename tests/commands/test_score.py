"""`dsel score` and `dsel export`: values of rows against the trainer's own, and what a run kept as a dataset."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset, load_dataset
from trl import DPOConfig, DPOTrainer

from dsel_trl.cli import main
from tests import tiny

COMMON = ["--use_cpu", "true", "--gradient_checkpointing", "false"]


@pytest.fixture
def pairs(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = tiny.preferences(20)
    rows = rows.remove_columns([name for name in ("score_chosen", "score_rejected") if name in rows.column_names])
    rows = rows.add_column("score_chosen", [float(i) for i in range(20)]).add_column("score_rejected", [0.0] * 20)
    rows.to_parquet(tmp_path / "pairs.parquet")
    return tmp_path / "pairs.parquet"


def test_values_are_the_trainers_and_blocks_are_not_measured_again(pairs, model, tmp_path, capsys, monkeypatch):
    file = tmp_path / "scored.parquet"
    words = ["score", "--dataset_name", str(pairs), "--model_name_or_path", str(model), "--output_file", str(file)]
    words += ["--block", "8", "--selection", "[{name: margin, source: explicit}, {name: robust_dpo}]", *COMMON]
    before = pairs.read_bytes()
    # The first time it is interrupted after two blocks.
    import dsel_trl.commands.score as score

    save, saved = score.save_arrays, []

    def interrupted(path, arrays):
        if len(saved) == 2:
            raise KeyboardInterrupt
        saved.append(path)
        save(path, arrays)

    monkeypatch.setattr(score, "save_arrays", interrupted)
    assert main(words) == 130
    assert not file.exists()
    monkeypatch.setattr(score, "save_arrays", lambda path, arrays: (saved.append(path), save(path, arrays)))
    assert main(words) == 0, capsys.readouterr().err
    # Three blocks of values and three of the method that scores batches, each once; a column is only read.
    assert len(saved) == len(set(saved)) == 6
    assert not any("margin" in path.name for path in saved)
    assert not list(tmp_path.glob(".*parts"))
    assert pairs.read_bytes() == before
    rows = load_dataset("parquet", data_files=str(file), split="train")
    assert rows["chosen"][:] == Dataset.from_parquet(str(pairs))["chosen"][:]
    args = DPOConfig(str(tmp_path / "o"), use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False,
                     per_device_eval_batch_size=20, precompute_ref_log_probs=True)  # fmt: skip
    trainer = DPOTrainer(str(model), args=args, train_dataset=Dataset.from_parquet(str(pairs)))
    for side in ("chosen", "rejected"):
        ours = torch.tensor(rows[f"ref_{side}_logps"][:])
        expected = torch.tensor(trainer.train_dataset[f"ref_{side}_logps"][:])
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-3)
        # The policy is the reference still.
        np.testing.assert_allclose(rows[f"{side}_logps"][:], rows[f"ref_{side}_logps"][:], rtol=1e-5)
    np.testing.assert_allclose(rows["implicit_margin"][:], 0, atol=1e-4)
    np.testing.assert_allclose(rows["loss"][:], np.log(2), rtol=1e-4)
    assert rows["margin"][:] == [float(i) for i in range(20)]
    assert rows["robust_dpo"][:] == pytest.approx([rows["robust_dpo"][0]] * 20, abs=1e-4)
    assert main(words) == 2
    assert "exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--output_file", "x.csv"], "must end in .parquet"),
        (["--output_file", "x.parquet", "--trainer", "ppo"], "'ppo'"),
        (["--output_file", "x.parquet", "--block", "0"], "block=0"),
        (["--output_file", "x.parquet", "--bock", "1"], "'--bock'"),
    ],
)
def test_mistakes(pairs, model, tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    assert main(["score", "--dataset_name", str(pairs), "--model_name_or_path", str(model), *words]) == 2
    assert said in capsys.readouterr().err


def test_what_a_run_kept_is_a_dataset(pairs, model, tmp_path, capsys):
    run = tmp_path / "run"
    words = ["dpo", "--dataset_name", str(pairs), "--model_name_or_path", str(model), "--output_dir", str(run)]
    selection = [{"name": "margin", "source": "explicit", "keep": 0.5}, {"name": "robust_dpo"}]
    words += ["--selection", json.dumps(selection), "--max_steps", "2", "--per_device_train_batch_size", "4"]
    assert main([*words, "--save_strategy", "no", "--report_to", "none", *COMMON]) == 0
    before = pairs.read_bytes()
    assert main(["export", str(run)]) == 0
    kept = load_dataset("parquet", data_files=str(run / "kept.parquet"), split="train")
    assert kept["score_chosen"][:] == [float(i) for i in range(10, 20)]
    assert kept["dsel_reason"][:] == [""] * 10
    assert sum(kept["dsel_visits"]) == 8
    # The first of the two steps is the warm-up of `robust_dpo`.
    assert sum(w is not None and w == w for w in kept["dsel_weight"]) == 4
    assert main(["export", str(run), "--all", "--output_file", str(tmp_path / "all.parquet")]) == 0
    everything = load_dataset("parquet", data_files=str(tmp_path / "all.parquet"), split="train")
    assert everything["dsel_dropped_by"][:] == ["margin"] * 10 + [""] * 10
    assert everything["dsel_reason"][0].startswith("margin: scores from 10 up are kept")
    assert everything["dsel_decision_score"][:] == [float(i) for i in range(20)]
    assert pairs.read_bytes() == before
    # Another trainer takes it.
    args = DPOConfig(str(tmp_path / "o"), use_cpu=True, bf16=False, report_to="none")
    assert len(DPOTrainer(str(model), args=args, train_dataset=kept).train_dataset) == 10
    capsys.readouterr()
    assert main(["export", str(run)]) == 2
    assert "nothing was overwritten" in capsys.readouterr().err
    short = Dataset.from_parquet(str(pairs)).select(range(15))
    short.to_parquet(str(pairs))
    assert main(["export", str(run), "--output_file", str(tmp_path / "z.parquet")]) == 2
    assert "has 15 rows" in capsys.readouterr().err
