"""What a run's examples say: their messages and their texts, in one way for every method that reads text."""

from collections.abc import Sequence
from typing import Any

from ..core.run import Run

Messages = list[tuple[str, str]]
SIDES = ("chosen", "rejected", "both")


def text_columns(run: Run) -> tuple[str, ...]:
    """
    The columns that hold the text of the run's dataset.

    Raises:
        `ValueError`: if it holds none; the message lists its columns.
    """
    present = run.dataset.column_names if run.size else []
    field = getattr(run.arguments, "dataset_text_field", "text")
    forms: list[tuple[str, ...]] = [("prompt", "chosen", "rejected")] if run.trainer == "dpo" else []
    forms += [("messages",), ("prompt", "completion"), (field,), ("input_ids",)]
    for form in forms:
        if all(name in present for name in form):
            return form
    raise ValueError(f"The dataset holds no text that a method could read; its columns are {sorted(present)}.")


def example_messages(run: Run, side: str = "chosen") -> list[Messages]:
    """
    Every example as (role, text) messages, without the end token that the trainer has put behind them.

    A text without structure is one message of the role `text`; rows that hold tokens only are decoded.

    Args:
        run ([`Run`]):
            The run.
        side (`str`, *optional*, defaults to `"chosen"`):
            Of a pair: prompt and `"chosen"` response, prompt and `"rejected"`, or prompt and `"both"`.

    Raises:
        `ValueError`: if the dataset holds no text.
    """
    form = text_columns(run)
    end = getattr(run.processing_class, "eos_token", None)
    columns = [run.values(name) for name in form]
    if form == ("messages",):
        return [_messages(row, "user", end) for row in columns[0]]
    if len(form) == 1:
        texts = columns[0]
        if form == ("input_ids",):
            texts = run.processing_class.batch_decode(list(texts), skip_special_tokens=True)
        return [[("text", _without_end(text, end))] for text in texts]
    prompts, *responses = columns
    if len(responses) == 2 and side != "both":
        responses = [responses[SIDES.index(side)]]
    return [
        _messages(prompt, "user", end)
        + [message for answer in answers for message in _messages(answer, "assistant", end)]
        for prompt, *answers in zip(prompts, *responses, strict=True)
    ]


def example_texts(run: Run, side: str = "chosen") -> list[str]:
    """Every example as one text: its messages, one below the other."""
    return [joined(messages) for messages in example_messages(run, side)]


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
    """A conversation as its last answer and all that stands before it."""
    if messages and messages[-1][0] in ("assistant", "text"):
        return joined(messages[:-1]), messages[-1][1]
    return joined(messages), ""


def _messages(value: Any, role: str, end: str | None) -> Messages:
    if isinstance(value, str):
        return [(role, _without_end(value, end))]
    return [(message["role"], _without_end(message.get("content") or "", end)) for message in value]


def _without_end(text: str, end: str | None) -> str:
    return text.removesuffix(end) if end else text
