"""Texts of prepared rows: prompts, responses, and new responses in the form of the old ones."""

from typing import Any

Prompt = str | list[dict[str, str]]
# What a trainer adds to the rows it has prepared: stale as soon as a row's text changes.
PREPARED = (
    "prompt_ids",
    "chosen_ids",
    "rejected_ids",
    "input_ids",
    "labels",
    "completion_mask",
    "ref_chosen_logps",
    "ref_rejected_logps",
)


def prompts_of(dataset: Any) -> list[Prompt]:
    """
    The prompts of a prepared dataset.

    Raises:
        `ValueError`: if it holds no text.
    """
    if "prompt" not in dataset.column_names:
        raise ValueError(f"Texts are needed, but the dataset has no column 'prompt', only {dataset.column_names}.")
    return list(dataset["prompt"])


def responses_of(dataset: Any, side: str, end: str | None) -> list[str]:
    """The responses in column `side` as texts, without the end token that the trainer has put behind them."""
    if side not in dataset.column_names:
        raise ValueError(f"Texts are needed, but the dataset has no column {side!r}, only {dataset.column_names}.")
    return [response_text(value, end) for value in dataset[side]]


def response_text(value: Any, end: str | None = None) -> str:
    """A response as text: a string, or the content of its last message."""
    text = value if isinstance(value, str) else value[-1]["content"]
    return text.removesuffix(end) if end else text


def as_response(text: str, prompt: Prompt) -> Any:
    """A text as the response to `prompt`: a message if the prompt is a conversation."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def unprepared(dataset: Any, *more: str) -> Any:
    """The dataset without what the trainer has added to it, and without the columns `more`."""
    return dataset.remove_columns([name for name in (*PREPARED, *more) if name in dataset.column_names])
