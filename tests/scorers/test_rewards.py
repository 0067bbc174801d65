"""Explicit margins from a function or a reward model, and where they are kept."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer, LlamaForSequenceClassification

from dsel_trl import SelectionCallback, create_method
from dsel_trl.data.responses import response_text
from dsel_trl.scorers.rewards import RewardModel, load_reward, score_responses
from tests import tiny


def words(prompts, responses):
    """More words, more reward."""
    return [float(len(response.split())) for response in responses]


def without(*columns):
    return tiny.preferences().remove_columns(list(columns))


@pytest.fixture(scope="module")
def reward_model(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        LlamaForSequenceClassification.from_pretrained(model, num_labels=1).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


def test_a_function_by_name():
    assert load_reward("tests.scorers.test_rewards:words")([""], ["a b"]) == [2.0]
    assert load_reward(words) is words


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("words", "module:function"),
        ("no_such_module:f", "cannot be imported"),
        ("tests.scorers.test_rewards:wordz", "has no 'wordz'"),
        ("tests.scorers.test_rewards:__doc__", "not a function"),
    ],
)
def test_what_is_no_function(spec, message):
    with pytest.raises(ValueError, match=message):
        create_method("bees", sources=["explicit"], reward=spec)


def test_values_are_in_the_order_of_the_responses():
    responses = ["a", "a b c", "", "a b"]
    np.testing.assert_array_equal(score_responses(words, [""] * 4, responses, batch_size=2, quiet=True), [1, 3, 0, 2])
    with pytest.raises(ValueError, match="1 values for 2"):
        score_responses(lambda p, r: [1.0], ["", ""], ["a", "b"], quiet=True)
    assert np.isnan(score_responses(lambda p, r: [None], [""], ["a"], quiet=True)).all()


def test_an_unfinished_scoring_is_taken_up(tmp_path, monkeypatch):
    monkeypatch.setattr("dsel_trl.scorers.rewards.SAVE_EVERY", 1)
    seen = []

    def failing(prompts, responses):
        if len(seen) == 2:
            raise RuntimeError
        seen.append(responses)
        return words(prompts, responses)

    responses = ["a " * n for n in range(1, 7)]
    arguments = {"batch_size": 2, "quiet": True, "partial": tmp_path / "part"}
    with pytest.raises(RuntimeError):
        score_responses(failing, [""] * 6, responses, **arguments)
    rest = []
    values = score_responses(lambda p, r: rest.extend(r) or words(p, r), [""] * 6, responses, **arguments)
    np.testing.assert_array_equal(values, np.arange(1, 7))
    assert len(rest) == 2


def test_the_text_of_a_response():
    assert response_text(" a<eos>", "<eos>") == " a"
    assert response_text([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], None) == "y"


def test_a_method_without_columns_uses_the_function(make_trainer):
    dataset = without("score_chosen", "score_rejected")
    trainer = make_trainer("dpo", dataset=dataset, max_steps=1)
    callback = SelectionCallback(trainer, "bees", sources=["explicit"], keep=0.25, reward=words)
    trainer.train()
    counts = [np.array([len(text.split()) for text in dataset[side]]) for side in ("chosen", "rejected")]
    np.testing.assert_array_equal(callback.ledger["bees_reward_chosen"], counts[0])
    margin = counts[0] - counts[1]
    kept = ~callback.ledger.dropped
    assert margin[kept].min() >= margin[~kept].max()


def test_a_reward_model_scores_once_and_is_kept(make_trainer, tmp_path, reward_model, monkeypatch):
    settings = {"dataset": without("score_chosen"), "output_dir": tmp_path / "run", "max_steps": 1}
    found = []
    for turn in range(2):
        if turn:
            monkeypatch.setattr("dsel_trl.scorers.rewards.score_responses", None)
        trainer = make_trainer("dpo", **settings)
        callback = SelectionCallback(
            trainer, "margin", source="explicit", action="keep_top", reward_model=str(reward_model)
        )
        trainer.train()
        found.append(callback.ledger["margin_reward_chosen"].copy())
    np.testing.assert_array_equal(found[0], found[1])
    assert not list((tmp_path / "run" / "selection").glob("*.part"))
    alone = RewardModel(str(reward_model))
    rows = settings["dataset"].select(range(3))
    expected = [alone([row["prompt"]], [row["chosen"]])[0] for row in rows]
    np.testing.assert_allclose(found[0][:3], expected, rtol=1e-4, atol=1e-5)


def test_a_causal_model_of_many_labels_is_no_reward(model, tmp_path):
    LlamaForSequenceClassification.from_pretrained(model, num_labels=3).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="3 labels"):
        RewardModel(str(tmp_path))
    with pytest.raises(ValueError, match="cannot be loaded"):
        RewardModel(str(tmp_path / "nowhere"))


def test_columns_and_reward_are_not_both_needed(make_trainer):
    trainer = make_trainer("dpo", dataset=Dataset.from_list([dict(r) for r in without("score_chosen")]))
    with pytest.raises(ValueError, match="score_chosen"):
        SelectionCallback(trainer, "uni_dpo")
    with pytest.raises(ValueError, match="give one of them"):
        create_method("uni_dpo", reward=words, reward_model="x")
