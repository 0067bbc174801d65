"""`dsel value`: what it finds and writes, that a killed one goes on, and what it refuses."""

import json

import numpy as np
import pytest
from datasets import Dataset

from dsel_trl.cli import DONE, MISTAKE, main
from dsel_trl.data.demo.corpus import demo_completions
from dsel_trl.functional.influence.linear_probe import ProbeGame

VOCABULARY = "amber basin cedar delta ember fjord grove heron inlet jetty knoll lagoon marsh nadir oasis prairie"
WORDS = VOCABULARY.split()


def pairs(size, flips=0.0, seed=0):
    """Chosen answers use the prompt's words, rejected ones others; some labels are flipped."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(size):
        asked, other = rng.permutation(WORDS)[:6], rng.permutation(WORDS)[:6]
        answers = [f"it is the {' '.join(asked[:4])}", f"it is the {' '.join(other[:4])}"]
        flipped = i < flips * size
        if flipped:
            answers.reverse()
        rows.append(
            {
                "prompt": f"tell me of {' '.join(asked)}",
                "chosen": answers[0],
                "rejected": answers[1],
                "source": f"s{4 * i // size}",
                "vector": [1.0 - 2.0 * flipped, float(rng.standard_normal())],
                "truth_flipped": int(flipped),
            }
        )
    return Dataset.from_list(rows)


@pytest.fixture
def words(tmp_path):
    """Data of which the first quarter, the source `s0`, is flipped; and clean held-out pairs."""
    pairs(80, 0.25).to_parquet(str(tmp_path / "data.parquet"))
    pairs(60, seed=1).to_parquet(str(tmp_path / "target.parquet"))
    words = ["value", str(tmp_path / "data.parquet"), "--target", str(tmp_path / "target.parquet")]
    return [*words, "--output_dir", str(tmp_path / "out"), "--features", "8"]


def written(folder):
    table = Dataset.from_parquet(str(folder / "values.parquet"), keep_in_memory=True)
    return table, json.loads((folder / "value.json").read_text())


def test_a_source_of_wrong_labels_is_worth_less_than_nothing(words, tmp_path, capsys):
    assert main([*words, "--group_column", "source"]) == DONE, capsys.readouterr().err
    table, summary = written(tmp_path / "out")
    values = {player["name"]: player["value"] for player in summary["players"]}
    assert values["s0"] < 0 < min(values[name] for name in ("s1", "s2", "s3"))
    assert summary["exact"]
    np.testing.assert_allclose(sum(values.values()), summary["worth_of_all"])
    # Of a group, every row gets an equal part.
    assert table["group"][:] == [f"s{i // 20}" for i in range(80)]
    np.testing.assert_allclose(table["value"][:], [values[f"s{i // 20}"] / 20 for i in range(80)])
    told = capsys.readouterr().out
    assert "be trusted?" in told.splitlines()[0]
    assert "s0" in told.splitlines()[-3]
    assert not (tmp_path / "out" / "unfinished").exists()


def test_flipped_pairs_are_worth_less_and_a_killed_run_goes_on(words, tmp_path, capsys, monkeypatch):
    words += ["--permutations", "40"]
    assert main(words) == DONE, capsys.readouterr().err
    table, summary = written(tmp_path / "out")
    values, flipped = np.array(table["value"][:]), np.arange(80) < 20
    assert np.mean(values[~flipped][:, None] > values[flipped][None]) > 0.9
    assert summary["trust"]["verdict"] is not None
    assert summary["orders"] == 40
    told = capsys.readouterr().out
    assert "They still move" in told

    grown, walked = ProbeGame.growing, []

    def killed(game, order):
        walked.append(order)
        if len(walked) > 25:
            raise KeyboardInterrupt
        return grown(game, order)

    again = [*words[:4], "--output_dir", str(tmp_path / "again"), *words[6:]]
    monkeypatch.setattr(ProbeGame, "growing", killed)
    assert main(again) == 130
    assert not (tmp_path / "again" / "values.parquet").exists()
    walked.clear()
    # Twenty orders are on disk: the rest are those that had not been walked.
    assert main(again) == DONE, capsys.readouterr().err
    assert len(walked) == 20
    assert (tmp_path / "again" / "values.parquet").read_bytes() == (tmp_path / "out" / "values.parquet").read_bytes()


def test_clusters_and_embeddings_are_valued(words, tmp_path, capsys):
    pytest.importorskip("sklearn")
    assert main([*words, "--clusters", "2", "--embedding_column", "vector"]) == DONE, capsys.readouterr().err
    table, summary = written(tmp_path / "out")
    assert {player["name"] for player in summary["players"]} == set(table["group"][:])
    # Two players leave nothing to hold out.
    assert summary["trust"]["verdict"] is None


def test_completions_are_valued(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    for split, rows in demo_completions(train_size=40, test_size=20).items():
        rows.to_parquet(str(tmp_path / "data" / f"{split}.parquet"))
    words = ["value", str(tmp_path / "data"), "--output_dir", str(tmp_path / "out"), "--permutations", "10"]
    assert main(words) == DONE, capsys.readouterr().err
    table, _ = written(tmp_path / "out")
    assert np.isfinite(table["value"][:]).all()
    assert len(table) == 40
    assert "group" not in table.column_names


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--group_column", "origin"], "no column 'origin'"),
        (["--group_column", "truth_flipped"], "truth_flipped"),
        (["--group_column", "source", "--clusters", "3"], "give one of them"),
        (["--clusters", "81"], "more than the 80 rows"),
        (["--embedding_column", "source"], "embedding_column='source'"),
        (["--ridge", "0"], "ridge=0.0"),
        (["--keep", "0"], "keep"),
        (["--target_split", "test"], "no split 'test'"),
        (["--smell", "1"], "'--smell'"),
    ],
)
def test_mistakes_are_told(words, more, told, tmp_path, capsys):
    assert main([*words, *more]) == MISTAKE
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out" / "values.parquet").exists()


def test_the_target_is_of_the_same_format_and_held_out(words, tmp_path, capsys):
    demo_completions(train_size=8, test_size=8)["test"].to_parquet(str(tmp_path / "sft.parquet"))
    assert main([*words[:2], "--target", str(tmp_path / "sft.parquet"), *words[4:]]) == MISTAKE
    assert "'chosen' and 'rejected'" in capsys.readouterr().err
    assert main([*words[:2], *words[4:], "--target_split", "train"]) == MISTAKE
    assert "what is valued itself" in capsys.readouterr().err
