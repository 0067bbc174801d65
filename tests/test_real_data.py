"""Real pairs, instructions and documents, through the program as a person runs it; skipped where there are none."""

import json
import os
from pathlib import Path

import pytest
from datasets import Dataset

from dsel_trl.cli import DONE, main

# A folder with `data/*.parquet` and `models/tiny128`; none of it is part of the project.
REAL = Path(os.environ.get("DSEL_REAL_DATA", Path(__file__).parents[2] / "shared"))
MODEL = REAL / "models" / "tiny128"
PAIRS, COMPLETIONS = "pref_alpacaeval_short_train", "sft_alpaca_train"
CONVERSATIONS, DOCUMENTS = "pref_hh_harmless_conv_train", "docs_varlen"
LOGITS = {"score_chosen_column": "logit_chosen", "score_rejected_column": "logit_rejected"}

pytestmark = pytest.mark.skipif(
    not MODEL.is_dir(), reason=f"no real data in {REAL}: DSEL_REAL_DATA names their folder"
)

# Data, the methods, and what they keep (`None`: a share that the run decides).
RUNS = {
    "alignment_potential": (
        PAIRS,
        [{"name": "alignment_potential", "keep": 0.5, "contradicted": "keep", **LOGITS}],
        0.5,
    ),
    "margin": (PAIRS, [{"name": "margin", "source": "explicit", "keep": 0.5, **LOGITS}], 0.5),
    "selective_dpo": (PAIRS, [{"name": "selective_dpo", "keep": 0.5, "evaluations": 1}], 0.5),
    "infobatch": (PAIRS, [{"name": "infobatch"}], None),
    "conversations": (CONVERSATIONS, [{"name": "margin", "action": "weight"}, {"name": "token_budget"}], 1.0),
    "instructions": (COMPLETIONS, [{"name": "ifd", "keep": 0.5, "limit": 100.0}], 0.5),
    "documents": (DOCUMENTS, [{"name": "zip", "keep": 0.5, "k1": 24, "k2": 8, "k3": 4, "unchosen": "restore"}], 0.5),
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Paths of small random parts of the data."""
    folder = tmp_path_factory.mktemp("real")
    for name in (PAIRS, COMPLETIONS, CONVERSATIONS, DOCUMENTS):
        dataset = Dataset.from_parquet(str(REAL / "data" / f"{name}.parquet"), keep_in_memory=True)
        dataset.shuffle(seed=0).select(range(48)).to_parquet(str(folder / f"{name}.parquet"))
    return folder


def train(rows, output, name, lora):
    data, selection, _ = RUNS[name]
    words = ["dpo" if data in (PAIRS, CONVERSATIONS) else "sft", "--dataset_name", str(rows / f"{data}.parquet")]
    words += ["--model_name_or_path", str(MODEL), "--output_dir", str(output), "--selection", json.dumps(selection)]
    words += ["--max_steps", "3", "--per_device_train_batch_size", "4", "--max_length", "128", "--use_cpu", "true"]
    words += ["--report_to", "none", "--save_strategy", "no", "--logging_steps", "1"]
    words += ["--use_peft", "--lora_target_modules", "all-linear"] if lora else []
    assert main(words) == DONE
    return json.loads((output / "selection" / "summary.json").read_text())


@pytest.mark.parametrize("name", RUNS)
def test_a_run_on_real_data(rows, tmp_path, capsys, name):
    summary = train(rows, tmp_path / "run", name, lora=False)
    assert summary["steps"] == 3
    assert summary["examples_trained"] > 0
    expected = RUNS[name][2]
    if expected is not None:
        # Rows that are cut to nothing leave the data before anything is chosen.
        assert summary["kept_fraction"] == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize("name", ["alignment_potential", "selective_dpo"])
def test_a_run_with_lora(rows, tmp_path, capsys, name):
    summary = train(rows, tmp_path / "run", name, lora=True)
    assert summary["kept_fraction"] == pytest.approx(0.5, abs=0.03)
    assert (tmp_path / "run" / "adapter_config.json").is_file()


@pytest.mark.parametrize(("name", "more"), [(CONVERSATIONS, []), (PAIRS, ["--group_column", "dataset"])])
def test_real_pairs_are_valued_and_trained_on_by_their_values(name, more, rows, tmp_path, capsys):
    held = REAL / "data" / f"{name.removesuffix('train')}validation.parquet"
    words = ["value", str(rows / f"{name}.parquet"), "--target", str(held), "--output_dir", str(tmp_path)]
    assert main([*words, "--permutations", "10", "--features", "16", *more]) == DONE, capsys.readouterr().err
    summary = json.loads((tmp_path / "value.json").read_text())
    # Nobody is worth 0: what all of them add is what all are worth, up to what truncation leaves out.
    total = sum(player["value"] for player in summary["players"])
    assert total == pytest.approx(summary["worth_of_all"], rel=0.02)
    selection = [{"name": "data_shapley", "values": str(tmp_path / "values.parquet"), "keep": 0.5}]
    words = ["dpo", "--dataset_name", str(rows / f"{name}.parquet"), "--model_name_or_path", str(MODEL)]
    words += ["--output_dir", str(tmp_path / "run"), "--selection", json.dumps(selection), "--max_steps", "1"]
    words += ["--per_device_train_batch_size", "2", "--max_length", "128", "--use_cpu", "true", "--report_to", "none"]
    assert main([*words, "--save_strategy", "no"]) == DONE, capsys.readouterr().err
    ledger = Dataset.from_parquet(str(tmp_path / "run" / "selection" / "ledger.parquet"), keep_in_memory=True)
    values = Dataset.from_parquet(str(tmp_path / "values.parquet"), keep_in_memory=True)["value"][:]
    # The trainer drops over-long rows; the ledger's ids are those of the file.
    assert ledger["data_shapley"][:] == pytest.approx([values[row] for row in ledger["id"][:]], rel=1e-5)
