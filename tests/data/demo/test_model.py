"""The demo model: complete or absent, the same for the same seed, and made for the demo corpus."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dsel_trl.data.demo import model as demo_model
from dsel_trl.data.demo.corpus import demo_preferences
from dsel_trl.data.demo.model import build_demo_model


@pytest.fixture(autouse=True)
def few_tasks(monkeypatch):
    monkeypatch.setattr(demo_model, "WARMUP_TASKS", 64)


@pytest.fixture
def built(tmp_path):
    return build_demo_model(tmp_path / "model", steps=2)


def test_loads_and_encodes_the_corpus_without_losing_anything(built):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(built), AutoTokenizer.from_pretrained(built)
    assert 2e5 < model.num_parameters() < 1.5e6
    assert len(tokenizer) <= model.config.vocab_size
    assert (model.config.pad_token_id, model.config.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
    for row in demo_preferences(train_size=16, test_size=16)["test"]:
        messages = row["prompt"] + row["chosen"]
        ids = tokenizer.apply_chat_template(messages)["input_ids"]
        opening = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
        # TRL takes what follows the prompt as the completion: it must be a prefix.
        assert ids[: len(opening)] == opening
        assert ids[-1] == tokenizer.eos_token_id
        text = tokenizer.decode(ids, skip_special_tokens=True)
        assert all(message["content"] in text for message in messages)


def test_is_built_once_and_equal_for_the_same_seed(built, tmp_path, monkeypatch):
    again = build_demo_model(tmp_path / "again", steps=2)
    ours, theirs = load_file(built / "model.safetensors"), load_file(again / "model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    monkeypatch.setattr(demo_model, "_warm_up", lambda *args: pytest.fail("built again"))
    assert build_demo_model(built, steps=2) == built


def test_leaves_generator_and_threads_as_they_were(tmp_path):
    torch.manual_seed(5)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    build_demo_model(tmp_path / "model", steps=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def test_refuses_a_folder_with_something_else(built, tmp_path):
    with pytest.raises(FileExistsError, match="not the demo model"):
        build_demo_model(built, seed=1, steps=2)
    (tmp_path / "mine").mkdir()
    with pytest.raises(FileExistsError, match="mine"):
        build_demo_model(tmp_path / "mine")
    assert list((tmp_path / "mine").iterdir()) == []


def test_a_failure_while_saving_leaves_nothing(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        build_demo_model(tmp_path / "model", steps=1)
    assert list(tmp_path.iterdir()) == []


def test_no_warm_up_task_is_in_the_corpus():
    corpus = demo_preferences(0)
    known = {row[0]["content"] for split in corpus.values() for row in split["prompt"]}
    assert not known & {task.prompt for task in demo_model._warmup_tasks(0)}
