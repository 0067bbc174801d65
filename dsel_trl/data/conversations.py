"""What a run's examples say: their messages and their texts, in one way for every method that reads text."""

from collections.abc import Sequence
from typing import Any

from .responses import message_text
from .rows import Rows, UnreadableError

Messages = list[tuple[str, str]]


def text_columns(rows: Rows) -> tuple[str, ...]:
    """
    The columns that hold the texts of rows.

    Raises:
        `UnreadableError`: if there are none; the message lists the columns.
    """
    present = rows.column_names
    forms: list[tuple[str, ...]] = [("prompt", *rows.layout.sides), rows.layout.sides] if rows.layout.sides else []
    forms += [("messages",), ("prompt", "completion"), (rows.text_field,), ("input_ids",)]
    for form in forms:
        if form and all(name in present for name in form):
            return form
    raise UnreadableError(f"the dataset holds no text that a method could read; its columns are {sorted(present)}.")


def example_messages(rows: Rows) -> list[Messages]:
    """
    Every row as (role, text) messages, without the end token that the trainer has put behind them.

    A text without structure is one message of the role `text`; rows that hold tokens only are decoded. Of a pair the
    prompt and both responses are given: for one of them take `rows.side(...)`.

    Raises:
        `UnreadableError`: if the dataset holds no text.
    """
    form, end = text_columns(rows), rows.end
    columns = [rows.values(name) for name in form]
    if form == ("messages",):
        return [_messages(row, "user", end) for row in columns[0]]
    if form in ((rows.text_field,), ("input_ids",)):
        texts = columns[0]
        if form == ("input_ids",):
            texts = rows.tokenizer.batch_decode(list(texts), skip_special_tokens=True)
        return [[("text", _without_end(text, end))] for text in texts]
    roles = ["user" if name == "prompt" else "assistant" for name in form]
    return [
        [message for part, role in zip(parts, roles, strict=True) for message in _messages(part, role, end)]
        for parts in zip(*columns, strict=True)
    ]


def example_texts(rows: Rows) -> list[str]:
    """Every row as one text: its messages, one below the other."""
    return [joined(messages) for messages in example_messages(rows)]


def joined(messages: Sequence[tuple[str, str]]) -> str:
    """The texts of messages, one below the other."""
    return "\n".join(text for _, text in messages)


def turns(messages: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """
    Pairs (instruction, answer) of a conversation; an instruction without an answer has an empty one.

    What the system says belongs to no turn; a text without structure is the answer to an empty instruction.
    """
    found: list[tuple[str, str]] = []
    waiting: list[str] = []
    for role, text in messages:
        if role in ("assistant", "text"):
            found.append(("\n".join(waiting), text))
            waiting = []
        elif role != "system":
            waiting.append(text)
    return [*found, ("\n".join(waiting), "")] if waiting else found


def prompt_and_answer(messages: Sequence[tuple[str, str]]) -> tuple[str, str]:
    """
    A conversation as its last answer and all that stands before it.

    The two are kept apart by a line break, as in the plain template of instruction tuning; where they bring white
    space of their own it is left at that.
    """
    if messages and messages[-1][0] in ("assistant", "text"):
        before, answer = joined(messages[:-1]), messages[-1][1]
        apart = not before or before[-1].isspace() or answer[:1].isspace()
        return (before if apart else before + "\n"), answer
    return joined(messages), ""


def _messages(value: Any, role: str, end: str | None) -> Messages:
    if isinstance(value, str):
        return [(role, _without_end(value, end))]
    return [(message["role"], _without_end(message_text(message), end)) for message in value]


def _without_end(text: str, end: str | None) -> str:
    return text.removesuffix(end) if end else text
