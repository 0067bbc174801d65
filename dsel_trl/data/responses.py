"""Texts of prepared rows: prompts, responses, and new responses in the form of the old ones."""

from collections.abc import Mapping
from typing import Any

from .columns import plain_column
from .rows import UnreadableError

# What becomes of a generated response that the cap on its tokens has cut off.
UNFINISHED = ("drop", "keep")
Prompt = str | list[dict[str, str]]
# Columns of texts or messages.
SPOKEN = ("prompt", "chosen", "rejected", "completion", "messages")
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


def message_text(message: Mapping[str, Any]) -> str:
    """
    What a message says, also where its content comes in parts (`[{"type": "text", "text": ...}, {"type": "image"}]`).

    The texts of the parts are joined as chat templates join them, with nothing in between; parts of other kinds say
    nothing, and neither does a message that only calls a tool.
    """
    content = message.get("content")
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part if isinstance(part, str) else part.get("text") or "" for part in content)


def plain_prompt(prompt: Any) -> Prompt:
    """A prompt whose messages have texts for contents."""
    if isinstance(prompt, str):
        return prompt
    return [message | {"content": message_text(message)} for message in prompt]


def prompt_text(prompt: Prompt) -> str:
    """All that a prompt says: the texts of its messages, one below the other."""
    return prompt if isinstance(prompt, str) else "\n".join(message_text(message) for message in prompt)


def prompts_of(dataset: Any) -> list[Prompt]:
    """
    The prompts of a prepared dataset: texts, or messages with texts for contents.

    Raises:
        `UnreadableError`: if it holds no text.
    """
    if "prompt" not in dataset.column_names:
        raise UnreadableError(f"the dataset has no texts in a column 'prompt', only {sorted(dataset.column_names)}.")
    return [plain_prompt(prompt) for prompt in plain_column(dataset, "prompt")]


def responses_of(dataset: Any, side: str, end: str | None) -> list[str]:
    """The responses in column `side` as texts, without the end token that the trainer has put behind them."""
    if side not in dataset.column_names:
        raise UnreadableError(f"the dataset has no texts in a column {side!r}, only {sorted(dataset.column_names)}.")
    return [response_text(value, end) for value in plain_column(dataset, side)]


def response_text(value: Any, end: str | None = None) -> str:
    """A response as text: a string, or the content of its last message."""
    text = value if isinstance(value, str) else message_text(value[-1])
    return text.removesuffix(end) if end else text


def templated(tokenizer: Any, prompt: Prompt) -> str:
    """A prompt as the model is asked it: a conversation in its chat template, the answer's header included."""
    if isinstance(prompt, str):
        return prompt
    return tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)


def as_response(text: str, prompt: Prompt) -> Any:
    """A text as the response to `prompt`: a message if the prompt is a conversation."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def unprepared(dataset: Any, *more: str) -> Any:
    """
    The dataset without what the trainer has added to it, and without the columns `more`; its messages have texts for
    contents, as new rows beside them will have.
    """
    dataset = dataset.remove_columns([name for name in (*PREPARED, *more) if name in dataset.column_names])
    for name in SPOKEN:
        if name in dataset.column_names and _in_parts(dataset, name):
            plain = [plain_prompt(value) for value in plain_column(dataset, name)]
            dataset = dataset.remove_columns([name]).add_column(name, plain)
    return dataset


def _in_parts(dataset: Any, name: str) -> bool:
    """Whether the messages of a column have contents in parts."""
    values = plain_column(dataset.select(range(min(1, len(dataset)))), name)
    return any(not isinstance(v, str) and any(isinstance(m.get("content"), list) for m in v) for v in values)
