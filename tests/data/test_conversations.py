"""Conversations as texts."""

import pytest

from dsel_trl.data.conversations import prompt_and_answer


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([("user", "Add 1 and 2."), ("assistant", "3")], ("Add 1 and 2.\n", "3")),
        ([("user", "Add 1 and 2.\n"), ("assistant", "3")], ("Add 1 and 2.\n", "3")),
        ([("user", "Add 1 and 2."), ("assistant", " 3")], ("Add 1 and 2.", " 3")),
        ([("system", "Be short."), ("user", "Hi"), ("assistant", "Ho")], ("Be short.\nHi\n", "Ho")),
        ([("text", "A text.")], ("", "A text.")),
        ([("user", "Hi")], ("Hi", "")),
        ([("user", "Hi"), ("assistant", "")], ("Hi\n", "")),
    ],
)
def test_an_answer_stands_apart_from_its_instruction(messages, expected):
    assert prompt_and_answer(messages) == expected
