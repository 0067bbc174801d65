"""`dsel build`: a file of new rows, made once, never over an old one."""

import numpy as np
from datasets import Dataset

from dsel_trl.cli import DONE, MISTAKE, main
from dsel_trl.data.demo.corpus import demo_preferences
from dsel_trl.data.demo.model import build_demo_model


def pairs(folder, rows=6):
    path = folder / "pairs.parquet"
    demo_preferences(train_size=48, test_size=8)["train"].select(range(rows)).to_parquet(str(path))
    return path


def test_reward_augmented_doubles_the_pairs(tmp_path, capsys):
    source, target = pairs(tmp_path), tmp_path / "out" / "goals.parquet"
    words = ["build", "reward-augmented", "--dataset_name", str(source), "--output_file", str(target)]
    assert main([*words, "--template", "Score {g}."]) == DONE, capsys.readouterr().err
    before = Dataset.from_parquet(str(source), keep_in_memory=True)
    after = Dataset.from_parquet(str(target), keep_in_memory=True)
    usable = sum(w > r for w, r in zip(before["score_chosen"], before["score_rejected"], strict=True))
    assert len(after) == 2 * usable > 0
    assert all("Score " in str(prompt) for prompt in after["prompt"])

    capsys.readouterr()
    assert main(words) == MISTAKE
    assert "exists" in capsys.readouterr().err


def test_inco_continues_the_dataset_s_responses(tmp_path, capsys):
    model = build_demo_model(tmp_path / "model", steps=2)
    target = tmp_path / "inco.parquet"
    words = ["build", "inco", "--dataset_name", str(pairs(tmp_path)), "--output_file", str(target)]
    words += ["--model_name_or_path", str(model), "--samples", "1", "--continuations", "2", "--max_new_tokens", "4"]
    assert main(words) == MISTAKE
    assert "--reward" in capsys.readouterr().err
    words += ["--unfinished", "keep"]
    assert main([*words, "--reward", "tests.commands.test_build:length"]) == DONE, capsys.readouterr().err
    built = Dataset.from_parquet(str(target), keep_in_memory=True)
    assert len(built)
    assert all(w > r for w, r in zip(built["score_chosen"], built["score_rejected"], strict=True))


def test_edge_answers_what_the_guideline_lacks(tmp_path, capsys):
    model = build_demo_model(tmp_path / "model", steps=2)
    target = tmp_path / "edge.parquet"
    words = ["build", "edge", "--dataset_name", str(pairs(tmp_path)), "--output_file", str(target)]
    words += ["--model_name_or_path", str(model), "--guideline", "Answer with the result.", "--max_new_tokens", "4"]
    words += ["--annotate", "tests.commands.test_build:annotate", "--update", "tests.commands.test_build:update"]
    assert main([*words, "--keep", "0.5"]) == DONE, capsys.readouterr().err
    built = Dataset.from_parquet(str(target), keep_in_memory=True)
    # An action of special tokens only is none.
    assert 1 <= len(built) <= 3
    written = f"Answer with the result. And {len(built)} more rules."
    assert all(row[-1]["content"] == written for row in built["completion"])
    assert np.isfinite(built["edge_effectiveness"]).all()
    assert all(message["role"] == "user" for prompt in built["prompt"] for message in prompt)


def annotate(guideline, prompts):
    return [guideline] * len(prompts)


def update(guideline, prompts):
    return f"{guideline} And {len(prompts)} more rules."


def length(prompts, responses):
    return [float(len(response)) for response in responses]


def test_several_scores_are_one_goal(tmp_path, capsys):
    target = tmp_path / "goals.parquet"
    words = ["build", "reward-augmented", "--dataset_name", str(pairs(tmp_path)), "--output_file", str(target)]
    words += ["--attributes", "quality=score_chosen,score_rejected", "rank=score_chosen,score_rejected"]
    assert main(words) == DONE, capsys.readouterr().err
    built = Dataset.from_parquet(str(target), keep_in_memory=True)
    assert len(built)
    for row in built:
        value = f"{row['score_chosen']:g}"
        assert row["goal"] == {"quality": row["score_chosen"], "rank": row["score_chosen"]}
        assert f"quality {value}, rank {value}" in str(row["prompt"])


def test_an_unknown_kind_or_key_is_named(tmp_path, capsys):
    assert main(["build", "goals"]) == MISTAKE
    assert "reward-augmented" in capsys.readouterr().err
    words = ["build", "reward-augmented", "--dataset_name", "demo", "--output_file", str(tmp_path / "x.parquet")]
    assert main([*words, "--templat", "x"]) == MISTAKE
    assert "--templat" in capsys.readouterr().err
    assert not (tmp_path / "x.parquet").exists()
