"""DEITA: turns, scorers, the filter, and embeddings from everywhere."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dsel_trl import SelectionCallback, create_method
from dsel_trl.data.conversations import turns
from dsel_trl.functional.text.deita import diversity_filter, expected_digit
from tests import tiny

COLUMNS = {"complexity_column": "difficulty", "quality_column": "weight"}


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    """A small model whose vocabulary has the digits, out of order."""
    words = ["<pad>", "<eos>", "<unk>", "3", "1", "6", "2", "5", "4", *tiny.WORDS[:80]]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.5,
        pad_token_id=0,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = LlamaForCausalLM(config)
    folder = tmp_path_factory.mktemp("scorer")
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


@torch.no_grad()
def policy_states(trainer, rows, pooling):
    """Pooled last hidden states through the plain model, one example at a time."""
    states = []
    for row in rows:
        ids = row["input_ids"] if "input_ids" in row else row["prompt_ids"] + row["chosen_ids"]
        hidden = trainer.model.eval()(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0]
        states.append((hidden.mean(dim=0) if pooling == "mean" else hidden[-1]).numpy())
    return np.stack(states)


@pytest.mark.parametrize(("kind", "pooling"), [("dpo", "last"), ("sft", "mean")])
def test_score_first_then_diversity(make_trainer, kind, pooling):
    trainer = make_trainer(kind, learning_rate=0.0)
    rows = list(trainer.train_dataset)
    witness = tiny.attach(trainer, "deita", **COLUMNS, keep=0.4, threshold=0.3, pooling=pooling)
    trainer.train()
    scores = np.array([row["difficulty"] * row["weight"] for row in rows])
    vectors = policy_states(trainer, rows, pooling)
    expected = diversity_filter(scores, vectors, threshold=0.3, size=16)
    assert set(np.concatenate(witness.ids).tolist()) == set(expected.tolist())
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    similar = unit[expected] @ unit[expected].T - np.eye(len(expected))
    assert similar.max() <= 0.3 + 1e-4
    # The filter did something: the best 16 alone would be others.
    assert set(expected.tolist()) != set(np.argsort(-scores)[:16].tolist())


def test_scorers_are_asked_turn_by_turn(make_trainer, scorer):
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"w{i} w{i + 1}"},
                {"role": "assistant", "content": f"w{i + 2}"},
                *([{"role": "user", "content": f"w{i + 9}"}, {"role": "assistant", "content": "w3 w4"}] * (i % 3)),
            ]
        }
        for i in range(12)
    ]
    template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    trainer = chat_trainer(make_trainer, rows, template)
    callback = SelectionCallback(
        trainer,
        "deita",
        complexity_model=str(scorer),
        quality_model=str(scorer),
        complexity_template="rate {instruction}",
        quality_template="rate {instruction} then {output}",
        keep=1.0,
        threshold=1.0,
    )
    trainer.train()
    model = LlamaForCausalLM.from_pretrained(scorer).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(scorer)
    digits = [tokenizer.convert_tokens_to_ids(str(d)) for d in range(1, 7)]

    def rate(prompt):
        with torch.no_grad():
            logits = model(torch.tensor([tokenizer(prompt)["input_ids"]])).logits[0, -1, digits]
        return float(expected_digit(logits.numpy()))

    expected = []
    for row in rows:
        total = 0.0
        pairs = row["messages"]
        for user, assistant in zip(pairs[::2], pairs[1::2], strict=True):
            quality = rate(f"rate {user['content']} then {assistant['content']}")
            total += rate(f"rate {user['content']}") * quality
        expected.append(total)
    np.testing.assert_allclose(callback.ledger["deita_score"], expected, rtol=1e-4)
    assert np.ptp(expected) > 1


def chat_trainer(make_trainer, rows, template):
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    trainer = make_trainer("sft", max_steps=1)
    tokenizer = AutoTokenizer.from_pretrained(trainer.model.config._name_or_path)
    tokenizer.chat_template = template
    args = SFTConfig(trainer.args.output_dir, **{**tiny.COMMON, "max_steps": 1, "learning_rate": 0.0})
    return SFTTrainer(
        trainer.model.config._name_or_path,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


def test_turns():
    messages = [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c")]
    assert turns(messages) == [("a", "b"), ("c", "")]
    assert turns([("text", "x")]) == [("", "x")]


def test_scores_per_turn_in_columns(make_trainer):
    dataset = (
        tiny.completions().add_column("c", [[1.0, 2.0]] * 40).add_column("q", [[3.0, float(i)] for i in range(40)])
    )
    trainer = make_trainer("sft", dataset=dataset, max_steps=1)
    callback = SelectionCallback(
        trainer, "deita", complexity_column="c", quality_column="q", threshold=1.0, keep=0.5, embedding="policy"
    )
    trainer.train()
    np.testing.assert_allclose(callback.ledger["deita_score"], 3.0 + 2.0 * np.arange(40))
    assert np.flatnonzero(~callback.ledger.dropped).tolist() == list(range(20, 40))


def test_other_scores_are_not_taken_for_the_old_ones(make_trainer):
    found = []
    for factor in (1.0, 3.0):
        dataset = tiny.completions().add_column("c", [[factor]] * 40).add_column("q", [[1.0]] * 40)
        trainer = make_trainer("sft", dataset=dataset, max_steps=1)
        callback = SelectionCallback(trainer, "deita", complexity_column="c", quality_column="q", action="weight")
        trainer.train()
        found.append(callback.ledger["deita_score"].tolist())
    assert found == [[1.0] * 40, [3.0] * 40]


@pytest.mark.parametrize("source", ["column", "file"])
def test_embeddings_from_a_column_or_a_file(make_trainer, tmp_path, source):
    vectors = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
    dataset, name = tiny.completions(), f"file:{tmp_path / 'vectors.npy'}"
    np.save(tmp_path / "vectors.npy", vectors)
    if source == "column":
        dataset, name = dataset.add_column("vector", vectors.tolist()), "column:vector"
    trainer = make_trainer("sft", dataset=dataset, max_steps=1)
    callback = SelectionCallback(trainer, "deita", **COLUMNS, keep=1.0, threshold=0.2, embedding=name)
    trainer.train()
    scores = np.array(tiny.completions()["difficulty"]) * np.array(tiny.completions()["weight"])
    expected = diversity_filter(scores, vectors, threshold=0.2)
    assert set(np.flatnonzero(~callback.ledger.dropped)) == set(expected.tolist())


def test_as_a_weight_everything_is_trained(make_trainer):
    trainer = make_trainer("sft", max_steps=3, per_device_train_batch_size=4)
    witness = tiny.attach(trainer, "deita", **COLUMNS, action="weight")
    trainer.train()
    data = tiny.completions()
    scores = np.array(data["difficulty"]) * np.array(data["weight"])
    for step in witness.steps:
        np.testing.assert_allclose(step.values["weight"], scores[step.ids] / scores[step.ids].mean(), rtol=1e-5)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"threshold": 2}, "threshold=2"),
        ({"quality_template": "rate {instruction}"}, "output"),
        ({"embedding": "colum:x"}, "embedding='colum:x'"),
        ({"embedding": "file:none.npy"}, "no file"),
        ({"pooling": "max"}, "pooling='max'"),
    ],
)
def test_wrong_parameters(parameters, message):
    with pytest.raises(ValueError, match=message):
        create_method("deita", **parameters)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({}, "complexity_column='complexity'"),
        ({**COLUMNS, "embedding": "column:nothing"}, "column:nothing"),
        ({"complexity_column": "prompt", "quality_column": "weight"}, "Column 'prompt' must hold"),
        ({"complexity_model": "nowhere/at/all", "quality_column": "weight"}, "complexity_model='nowhere/at/all'"),
    ],
)
def test_errors_before_the_first_step(make_trainer, parameters, message):
    trainer = make_trainer("sft")
    SelectionCallback(trainer, "deita", **parameters)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_missing_library_is_named(make_trainer, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    trainer = make_trainer("sft")
    SelectionCallback(trainer, "deita", **COLUMNS, embedding="model:some/model")
    with pytest.raises(ImportError, match=r"dsel-trl\[embed\]"):
        trainer.train()


def test_fewer_than_asked_for_are_told(make_trainer):
    trainer = make_trainer("sft", max_steps=1)
    callback = SelectionCallback(trainer, "deita", **COLUMNS, keep=0.9, threshold=-1.0)
    trainer.train()
    assert (~callback.ledger.dropped).sum() == 1
    assert any("keeps 1 of the 36 examples" in note for note in callback.metrics_window.notes.values())
