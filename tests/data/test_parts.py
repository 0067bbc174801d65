"""Messages whose contents come in parts say what the same messages with plain contents say."""

from functools import partial

import numpy as np
import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from dsel_trl.data.build.self_play import build
from dsel_trl.data.responses import message_text, prompt_text, prompts_of, response_text, unprepared
from dsel_trl.scorers.rewards import score_responses
from tests import tiny

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} {% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %} {% endfor %}"
)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("plain", "plain"),
        (None, ""),
        ([], ""),
        ([{"type": "text", "text": "one"}, {"type": "text", "text": " two"}], "one two"),
        ([{"type": "image", "text": None}, {"type": "text", "text": "seen"}], "seen"),
        ([{"type": "image"}], ""),
        (["one", {"type": "text", "text": " two"}], "one two"),
    ],
)
def test_what_a_message_says(content, text):
    assert message_text({"role": "user", "content": content}) == text
    assert response_text([{"role": "user", "content": "x"}, {"role": "assistant", "content": content}]) == text
    assert prompt_text([{"role": "user", "content": content}]) == text


def test_a_message_that_calls_a_tool_says_nothing():
    assert message_text({"role": "assistant", "tool_calls": [{"name": "f"}]}) == ""


def conversational(size=16, parts=False):
    """The tiny pairs as conversations, with contents in parts if asked for."""

    def messages(role, text):
        content = [{"type": "text", "text": text[:3]}, {"type": "text", "text": text[3:]}] if parts else text
        return [{"role": role, "content": content}]

    rows = tiny.preferences(size)
    return Dataset.from_list(
        [
            {
                **row,
                "prompt": messages("user", row["prompt"]),
                "chosen": messages("assistant", row["chosen"]),
                "rejected": messages("assistant", row["rejected"]),
                "responses": [row["chosen"], row["rejected"]],
                "scores": [row["score_chosen"], row["score_rejected"]],
            }
            for row in rows
        ]
    )


@pytest.fixture(scope="module")
def chat_model(model, tmp_path_factory):
    """The tiny model with a chat template that knows parts."""
    folder = tmp_path_factory.mktemp("parts")
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def words(prompts, responses):
    assert all(isinstance(message["content"], str) for prompt in prompts for message in prompt)
    return [float(sum(map(ord, response))) for response in responses]


METHODS = {
    "zip": {"keep": 0.5},
    "dsir": {"keep": 0.5},
    "perplexity": {"keep": 0.5},
    "ifd": {"keep": 0.5},
    "margin": {"source": "explicit", "reward": words, "keep": 0.5},
    "filtered_dpo": {"reward": words, "max_new_tokens": 2},
    "curry_dpo": {"responses_column": "responses", "scores_column": "scores"},
    "alignment_potential": {"reward": words, "keep": 0.5},
    "reward_augmented": {},
}


@pytest.mark.parametrize("method", METHODS)
def test_methods_that_read_texts_do_the_same(make_trainer, chat_model, tmp_path, method):
    (tmp_path / "target.txt").write_text("w1 w2 w3\nw4 w5\n")
    parameters = METHODS[method] | ({"target": str(tmp_path / "target.txt")} if method == "dsir" else {})
    runs = []
    for parts in (False, True):
        output = tmp_path / f"parts-{parts}"
        trainer = make_trainer(
            "dpo", model=chat_model, dataset=conversational(parts=parts), max_steps=2, output_dir=output
        )
        witness = tiny.attach(trainer, method, **parameters)
        trainer.train()
        arrays, _ = trainer.selection.ledger.state_dict()
        runs.append((witness.ids, arrays, tiny.weights_of(trainer)))
    assert runs[0][0] == runs[1][0]
    tiny.assert_same_arrays(runs[0][1], runs[1][1])
    tiny.assert_same_weights(runs[0][2], runs[1][2])


def test_new_rows_go_beside_old_ones():
    plain, parts = conversational(), conversational(parts=True)
    assert prompts_of(parts) == prompts_of(plain)
    assert unprepared(parts)["chosen"][:] == plain["chosen"][:]

    def generate(prompts, samples=1, **drawn):
        return [[f"w{i} w{j}" for j in range(samples)] for i in range(len(prompts))]

    built = [build(rows, generate, partial(score_responses, words), responses=2).to_list() for rows in (plain, parts)]
    assert built[0] == built[1]
    assert np.sum([row["self_play"] for row in built[0]]) == len(plain)
