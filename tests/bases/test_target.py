"""One parameter names a target, and it is checked before the first step."""

from dataclasses import dataclass

import numpy as np
import pytest
from datasets import Dataset, DatasetDict

from dsel_trl import Method, SelectionCallback
from dsel_trl.bases import Targeted
from tests import tiny


@dataclass
class Follows(Targeted):
    """Follows a target, and keeps what it was given."""

    name = "follows"
    trainers = ("dpo", "sft", "kto")

    def setup(self, run):
        self.rows = self.target_rows(run)


def followed(make_trainer, kind="sft", seed=42, **parameters):
    trainer = make_trainer(kind, max_steps=1, seed=seed)
    method = Follows(**parameters)
    trainer.add_callback(SelectionCallback(trainer, method))
    trainer.train()
    return trainer, method.rows


def refused(make_trainer, message, kind="sft", error=ValueError, **parameters):
    trainer = make_trainer(kind, max_steps=1)
    trainer.add_callback(SelectionCallback(trainer, Follows(**parameters)))
    with pytest.raises(error, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("kind", ["sft", "lm", "dpo", "kto"])
def test_the_rows_are_what_the_trainer_makes_of_them(make_trainer, kind):
    other = tiny.DATASETS[kind](6, seed=5)
    trainer, rows = followed(make_trainer, kind, target=other)
    assert len(rows) == 6
    assert rows.tokenized
    batch = rows.collate(np.arange(2))
    assert "example_id" not in batch
    mine = trainer.selection.run.passes.measure(lambda batch: batch.loss, rows=rows)
    assert np.isfinite(mine).all()
    assert len(mine) == 6
    assert trainer.selection.run.size == len(tiny.DATASETS[kind]())


def test_a_name_a_path_and_a_dataset_are_the_same(make_trainer, tmp_path):
    other = tiny.completions(6, seed=5)
    other.to_parquet(str(tmp_path / "set.parquet"))
    other.to_json(str(tmp_path / "set.jsonl"))
    DatasetDict(train=tiny.completions(3, seed=6), validation=other).save_to_disk(str(tmp_path / "folder"))
    found = [
        followed(make_trainer, target=other)[1],
        followed(make_trainer, target=str(tmp_path / "set.parquet"))[1],
        followed(make_trainer, target=tmp_path / "set.jsonl")[1],
        followed(make_trainer, target=str(tmp_path / "folder"), target_split="validation")[1],
    ]
    assert len({rows.fingerprint() for rows in found}) == 1


@pytest.mark.parametrize(
    ("kind", "columns"),
    [("sft", {"prompt", "completion"}), ("dpo", {"chosen", "rejected"}), ("kto", {"completion", "label"})],
)
def test_demo_has_the_form_of_the_trainer(make_trainer, kind, columns):
    run = SelectionCallback(make_trainer(kind), "uniform").run
    rows = Follows(target="demo", target_split="test", target_size=5).target_dataset(run)
    assert len(rows) == 5
    assert columns <= set(rows.column_names)


def test_a_size_draws_the_same_examples_again(make_trainer):
    other = tiny.completions(30, seed=5)
    drawn = [followed(make_trainer, target=other, target_size=8, seed=seed)[1] for seed in (1, 1, 2)]
    assert [len(rows) for rows in drawn] == [8, 8, 8]
    first, again, another = (rows.fingerprint() for rows in drawn)
    assert first == again != another
    whole = followed(make_trainer, target=other, target_size=30)[1]
    assert whole.fingerprint() == followed(make_trainer, target=other)[1].fingerprint()


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({}, "target=None: 'follows' follows a target"),
        ({"target": Dataset.from_dict({"prompt": [], "completion": []})}, "the dataset is empty"),
        ({"target": {"train": tiny.completions(2)}}, "Take one of its splits"),
        ({"target": 3}, "neither a name nor"),
        ({"target": "x.parquet", "target_size": -1}, "target_size=-1"),
        ({"target": "x.parquet", "target_size": 0.5}, "target_size=0.5"),
    ],
)
def test_a_slip_in_the_parameters(parameters, message):
    with pytest.raises(ValueError, match=message):
        Follows(**parameters)


def test_what_cannot_be_followed_is_said_before_the_first_step(make_trainer, tmp_path):
    other = tiny.completions(6, seed=5)
    other.to_parquet(str(tmp_path / "set.parquet"))
    other.select([]).to_parquet(str(tmp_path / "empty.parquet"))
    name = str(tmp_path / "set.parquet")
    refused(make_trainer, "target_size=7 is more than the 6 examples", target=name, target_size=7)
    refused(make_trainer, r"no split 'test', it has \['train'\]: set --target_split", target=name, target_split="test")
    refused(make_trainer, "no file or folder", error=FileNotFoundError, target=str(tmp_path / "none.parquet"))
    refused(make_trainer, "has no rows", target=str(tmp_path / "empty.parquet"))
    refused(make_trainer, "`DPOTrainer` needs the columns 'chosen' and 'rejected'.*'target'", "dpo", target=name)
    pairs = tiny.preferences(4)
    refused(make_trainer, "`SFTTrainer` needs the columns .*'prompt' and 'completion'.*'target'", target=pairs)
    long = Dataset.from_list([{**tiny.preferences(1)[0], "prompt": " ".join(["w1"] * 80)}] * 3)
    refused(make_trainer, "none of its examples is left.*max_length=64", "dpo", target=long)


def test_another_content_under_the_same_name_is_another_target(tmp_path):
    described = []
    for seed in (1, 1, 2):
        tiny.completions(6, seed=seed).to_parquet(str(tmp_path / "set.parquet"))
        described.append(Follows(target=str(tmp_path / "set.parquet")).describe())
    assert described[0] == described[1]
    assert described[0] != described[2]
    given = [Follows(target=tiny.completions(6, seed=seed)).describe() for seed in (1, 1, 2)]
    assert given[0] == given[1] != given[2]


def test_the_truth_of_a_test_is_no_part_of_a_target():
    rows = tiny.completions(6, seed=1)
    known = rows.add_column("truth_kind", ["a"] * 6)
    assert Follows(target=known).describe() == Follows(target=rows).describe()


def test_a_target_leaves_the_training_set_alone(make_trainer):
    assert issubclass(Targeted, Method)
    trainer = make_trainer("sft", max_steps=2)
    witness = tiny.attach(trainer, Follows(target=tiny.completions(6, seed=5)))
    trainer.train()
    assert len(np.concatenate(witness.ids)) == 4
