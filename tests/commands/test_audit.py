"""`dsel audit`: what it finds and writes, what it leaves alone, and that a killed one goes on."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from dsel_trl.cli import DONE, MISTAKE, main
from dsel_trl.data.demo.model import build_demo_model
from dsel_trl.data.pairs import PairTexts
from dsel_trl.scorers import pair_features

VOCABULARY = "amber basin cedar delta ember fjord grove heron inlet jetty knoll lagoon marsh nadir oasis prairie"
WORDS = VOCABULARY.split()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_demo_model(tmp_path_factory.mktemp("model") / "model", steps=2)


def pairs(size=60, flips=0.2):
    """Chosen answers use the prompt's words, rejected ones others; some labels are flipped."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(size):
        asked, other = rng.permutation(WORDS)[:6], rng.permutation(WORDS)[:6]
        answer, miss = f"it is the {' '.join(asked[:4])} {i}", f"it is the {' '.join(other[:4])} {i}"
        flipped = i < flips * size
        rows.append(
            {
                "prompt": f"tell me of {' '.join(asked)}",
                "chosen": miss if flipped else answer,
                "rejected": answer if flipped else miss,
                "score_chosen": 0.0,
                "score_rejected": 1.0,
                "truth_flipped": int(flipped),
            }
        )
    rows[-1] |= {name: rows[-2][name] for name in ("prompt", "chosen", "rejected")}
    rows[-3]["rejected"] = rows[-3]["chosen"]
    rows[-4] |= {"prompt": rows[-5]["prompt"], "chosen": rows[-5]["rejected"], "rejected": rows[-5]["chosen"]}
    rows[-6]["prompt"] += "<script>alert(1)</script>"
    return Dataset.from_list(rows)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "pairs.parquet"
    pairs().to_parquet(str(path))
    return path


def test_wrong_labels_are_found_and_the_data_is_left_alone(file, model, tmp_path, capsys):
    before, output, cleaned = file.read_bytes(), tmp_path / "out", tmp_path / "clean.parquet"
    words = ["audit", str(file), "--model_name_or_path", str(model), "--output_dir", str(output)]
    words += ["--trees", "20", "--device", "cpu", "--cleaned_file", str(cleaned)]
    assert main(words) == DONE, capsys.readouterr().err
    assert file.read_bytes() == before
    table = Dataset.from_parquet(str(output / "audit.parquet"), keep_in_memory=True)
    assert {"id", "probability", "action", "reason", "difference_sum", "opinion_linear"} <= set(table.column_names)
    data = pairs()
    chance = np.nan_to_num(np.array(table["probability"], dtype=float))
    flipped = np.array(data["truth_flipped"], dtype=bool)
    assert np.mean(chance[flipped][:, None] > chance[~flipped][None]) > 0.8
    assert table[59]["action"] == "drop"
    assert table[59]["reason"] == "repeats pair 58"
    assert table[57]["reason"] == "both responses are the same text"
    assert {table[55]["action"], table[56]["action"]} == {"drop", "review"}
    page = (output / "audit.html").read_text()
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page
    assert "http:" not in page
    assert "https:" not in page
    summary = json.loads((output / "audit.json").read_text())
    assert 0 <= summary["calibration_error"] <= 1
    kept = Dataset.from_parquet(str(cleaned), keep_in_memory=True)
    actions = table["action"]
    assert len(kept) == 60 - list(actions).count("drop")
    turned = next(i for i, action in enumerate(actions) if action == "flip")
    row = kept[sum(action != "drop" for action in actions[:turned])]
    assert (row["chosen"], row["score_chosen"]) == (data[turned]["rejected"], 1.0)
    # A file that exists is never written over.
    assert main(words) == MISTAKE
    assert "exists" in capsys.readouterr().err


def test_precision_of_the_weights_and_side_of_the_padding_do_not_matter(file, model, tmp_path):
    network, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    network = network.to(torch.bfloat16)
    for name, dtype, side in (("halves", torch.bfloat16, "left"), ("whole", torch.float32, "right")):
        network.to(dtype).save_pretrained(tmp_path / name)
        tokenizer.padding_side = tokenizer.truncation_side = side
        tokenizer.save_pretrained(tmp_path / name)
    words = ["audit", str(file), "--device", "cpu", "--signals", "texts", "statistics", "states"]
    found = {}
    for name, more in (("halves", []), ("whole", []), ("rounded", ["--dtype", "bfloat16"])):
        folder = tmp_path / ("halves" if name == "rounded" else name)
        own = ["--model_name_or_path", str(folder), "--output_dir", str(tmp_path / f"{name}-out"), *more]
        assert main([*words, *own]) == DONE
        table = Dataset.from_parquet(str(tmp_path / f"{name}-out" / "audit.parquet"), keep_in_memory=True)
        found[name] = np.nan_to_num(np.array(table["probability"], dtype=float))
    np.testing.assert_array_equal(found["halves"], found["whole"])
    # Forwards in bfloat16 round to three digits: the order of the pairs is much the same.
    assert np.corrcoef(found["rounded"], found["whole"])[0, 1] > 0.98
    assert np.abs(found["rounded"] - found["whole"]).mean() < 0.03


def test_a_killed_pass_goes_on(file, model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pair_features, "SHARD", 16)
    words = ["audit", str(file), "--model_name_or_path", str(model), "--device", "cpu", "--trees", "5"]
    read, calls = pair_features.read_responses, []

    def until(limit):
        def counted(*args, **kwargs):
            calls.append(args[2][0])
            if len(calls) == limit:
                raise KeyboardInterrupt
            return read(*args, **kwargs)

        return counted

    monkeypatch.setattr(pair_features, "read_responses", until(3))
    assert main([*words, "--output_dir", str(tmp_path / "killed")]) == 130
    monkeypatch.setattr(pair_features, "read_responses", until(0))
    assert main([*words, "--output_dir", str(tmp_path / "killed")]) == DONE, capsys.readouterr().err
    assert calls == [0, 32, 64, 64, 96]
    assert main([*words, "--output_dir", str(tmp_path / "whole")]) == DONE
    tables = [(tmp_path / name / "audit.parquet").read_bytes() for name in ("killed", "whole")]
    assert tables[0] == tables[1]


def test_texts_alone_and_what_cannot_be_had_is_said(file, tmp_path, capsys):
    output = tmp_path / "out"
    assert main(["audit", str(file), "--output_dir", str(output), "--trees", "10"]) == DONE
    assert "Not measured without --model_name_or_path: statistics, states" in capsys.readouterr().out
    assert main(["audit", str(file), "--output_dir", str(output), "--signals", "states"]) == MISTAKE
    assert "need a model" in capsys.readouterr().err
    assert main(["audit", str(file), "--output_dir", str(output), "--signals", "smell"]) == MISTAKE
    assert "smell" in capsys.readouterr().err
    assert main(["audit", str(file), "--output_dir", str(output), "--difference_columns", "truth_flipped"]) == MISTAKE
    assert "answers" in capsys.readouterr().err


def test_conversations_with_and_without_a_prompt():
    said = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    other = [said[0], {"role": "assistant", "content": "no"}]
    whole = PairTexts(Dataset.from_list([{"chosen": said, "rejected": other}]))
    apart = PairTexts(Dataset.from_list([{"prompt": said[:1], "chosen": said[1:], "rejected": other[1:]}]))
    for texts in (whole, apart):
        assert texts.asked == ["hi"]
        assert (texts.chosen, texts.rejected) == (["yes"], ["no"])
    plain = PairTexts(Dataset.from_list([{"chosen": "ask me: yes", "rejected": "ask me: yeah"}]))
    assert (plain.asked, plain.chosen) == (["ask me: "], ["yes"])
