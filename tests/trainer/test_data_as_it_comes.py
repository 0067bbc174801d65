"""Data as people have it: whatever TRL trains on, the selection trains on, bit for bit."""

import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset
from trl import RewardConfig, RewardTrainer

from dsel_trl import SelectionCallback
from tests import tiny

# In the order of tiny.preferences and tiny.completions: 12 rows.
BESIDE = {
    "text": pa.array(["safe", "unsafe"] * 6),
    "null": pa.nulls(12),
    "partly null": pa.array(["a", None] * 6),
    "lists of text": pa.array([["a", "b"], []] * 6),
    "structures": pa.array([{"kind": "x", "score": 1.0}] * 12),
    "fixed-size lists": pa.array([[0.5, 1.5]] * 12, pa.list_(pa.float32(), 2)),
    "dates": pa.array([datetime.date(2024, 1, 1)] * 12),
}


def with_column(dataset, name, values):
    return Dataset(dataset.flatten_indices().data.table.append_column(name, values))


def assert_trains_as_stock(make, method="uniform", **parameters):
    """Trains with and without a selection that changes nothing, saves on the way; gives both trainers."""
    stock, mine = make(), make()
    stock.train()
    mine.add_callback(SelectionCallback(mine, method, **parameters))
    mine.train()
    assert tiny.losses_of(mine) == tiny.losses_of(stock)
    tiny.assert_same_weights(tiny.weights_of(mine), tiny.weights_of(stock))
    assert list(Path(mine.args.output_dir).glob("checkpoint-*/selection/state.json"))
    return stock, mine


@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("dpo", "label"),
        ("dpo", "labels"),
        ("dpo", "input_ids"),
        ("sft", "label"),
        ("lm", "label"),
        ("sft", "chosen_ids"),
        ("kto", "labels"),
    ],
)
def test_a_column_that_is_not_trained_on(make_trainer, kind, name, beside):
    dataset = with_column(tiny.DATASETS[kind]().select(range(12)), name, BESIDE[beside])
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    assert_trains_as_stock(lambda: make_trainer(kind, dataset=dataset, **saving))


@pytest.fixture
def reward_model(tmp_path, model):
    from transformers import AutoTokenizer, LlamaForSequenceClassification

    torch.manual_seed(0)
    LlamaForSequenceClassification.from_pretrained(model, num_labels=1).save_pretrained(tmp_path / "reward")
    AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / "reward")
    return tmp_path / "reward"


@pytest.mark.parametrize("rows", ["text label", "tokenized before", "tokenized before, old names"])
def test_reward_data(reward_model, tmp_path, rows):
    dataset = tiny.preferences(12)
    if rows == "text label":
        dataset = with_column(dataset, "label", BESIDE["text"])
    else:
        names = ("chosen_ids", "rejected_ids") if "old" not in rows else ("chosen_input_ids", "rejected_input_ids")
        dataset = Dataset.from_dict({name: [[3 + i, 4 + j] for i in range(12)] for j, name in enumerate(names)})

    def make():
        config = {**tiny.COMMON, "max_steps": 2, "save_strategy": "steps", "save_steps": 2}
        return RewardTrainer(
            str(reward_model), args=RewardConfig(str(tmp_path / "out"), **config), train_dataset=dataset
        )

    assert_trains_as_stock(make)


def test_kto_labels_count(make_trainer, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    dataset = tiny.judged(12)
    first = make_trainer("kto", dataset=dataset, **saving)
    first.add_callback(SelectionCallback(first, "uniform"))
    first.train()
    judged_otherwise = dataset.remove_columns("label").add_column("label", [not label for label in dataset["label"]])
    second = make_trainer("kto", dataset=judged_otherwise, **saving)
    second.add_callback(SelectionCallback(second, "uniform"))
    with pytest.raises(ValueError, match="dataset"):
        second.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))


# ---- Rows that are tokenized when they are collated ----


class TokenizingCollator:
    """Makes inputs of texts, as people's own collators do."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, rows):
        batch = self.tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}


def collated_late(make_trainer, dataset, **config):
    """An SFT trainer whose rows are texts until they are collated."""
    trainer = make_trainer(
        "lm",
        dataset=dataset,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        save_strategy="steps",
        save_steps=2,
        **config,
    )
    trainer.data_collator = TokenizingCollator(trainer.processing_class)
    return trainer


def transformed(make_trainer, tmp_path, **config):
    """An SFT trainer whose rows are tokenized by `with_transform`."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(make_trainer("lm", max_steps=1).model.name_or_path)

    def tokenize(rows):
        ids = tokenizer(rows["text"])["input_ids"]
        return {"input_ids": ids, "labels": ids}

    return make_trainer(
        "lm",
        dataset=tiny.texts(12).with_transform(tokenize),
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        save_strategy="steps",
        save_steps=2,
        **config,
    )


LATE = {
    "collator": lambda make_trainer, tmp_path, **config: collated_late(make_trainer, tiny.texts(12), **config),
    "transform": transformed,
}


@pytest.mark.parametrize("late", LATE)
def test_rows_tokenized_late_train_as_stock(make_trainer, tmp_path, late):
    assert_trains_as_stock(lambda: LATE[late](make_trainer, tmp_path, max_steps=4))


@pytest.mark.parametrize("late", LATE)
@pytest.mark.parametrize("method", ["random", "zip", "curriculum"])
def test_rows_tokenized_late_are_selected(make_trainer, tmp_path, late, method):
    parameters = {"curriculum": {"by": "loss", "action": "keep_top"}}.get(method, {"keep": 0.5})
    trainer = LATE[late](make_trainer, tmp_path)
    witness = tiny.attach(trainer, method, **parameters)
    trainer.train()
    assert len(set(np.concatenate(witness.ids).tolist())) == 6


@pytest.mark.parametrize("late", LATE)
@pytest.mark.parametrize(
    ("method", "parameters"),
    [("length_curriculum", {}), ("token_budget", {"tokens": 100}), ("curriculum", {"by": "rarity"})],
)
def test_only_the_method_that_needs_tokens_is_refused(make_trainer, tmp_path, late, method, parameters):
    trainer = LATE[late](make_trainer, tmp_path, max_steps=2)
    trainer.add_callback(SelectionCallback(trainer, ["uniform"]))
    trainer.selection.detach()
    tiny.attach(trainer, method, **parameters)
    with pytest.raises(ValueError, match=f"'{method}' cannot be used here"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_changed_text_is_noticed(make_trainer, tmp_path):
    first = collated_late(make_trainer, tiny.texts(12), max_steps=2)
    first.add_callback(SelectionCallback(first, "uniform"))
    first.train()
    changed = tiny.texts(12).map(lambda row, i: {"text": "w1 w2"} if i == 7 else row, with_indices=True)
    second = collated_late(make_trainer, changed, max_steps=4)
    second.add_callback(SelectionCallback(second, "uniform"))
    with pytest.raises(ValueError, match="dataset"):
        second.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))


# ---- Datasets smaller than a batch ----


@pytest.mark.parametrize("kind", ["dpo", "sft"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_fewer_examples_than_a_batch(make_trainer, kind, accumulation):
    config = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": accumulation, "num_train_epochs": 3}
    dataset = tiny.DATASETS[kind]().select(range(3))
    saving = {"save_strategy": "steps", "save_steps": 2}
    assert_trains_as_stock(lambda: make_trainer(kind, dataset=dataset, **config, **saving))
    for method, parameters, trained in (("random", {"keep": 0.4}, 1), ("curriculum", {"by": "length"}, 3)):
        trainer = make_trainer(kind, dataset=dataset, **config)
        witness = tiny.attach(trainer, method, **parameters)
        trainer.train()
        assert [len(ids) for ids in witness.ids] == [trained] * 3


def test_candidates_of_fewer_examples_than_a_batch(make_trainer):
    trainer = make_trainer("dpo", dataset=tiny.preferences(3), per_device_train_batch_size=4, num_train_epochs=2)
    witness = tiny.attach(trainer, "select_k_of_b")
    trainer.train()
    assert len(witness.ids) == 2
    assert all(0 < len(ids) <= 3 for ids in witness.ids)
