"""Reward-augmented pairs: each pair twice, with the requested quality in the prompt (hf.co/papers/2410.08067)."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset

from ...functional.preference.reward_augmented import add_goal, augmentable, goal_rows, goal_text
from ..columns import column_names, numeric_column
from ..responses import Prompt, unprepared

GOAL_TEMPLATE = "Requested quality (1-10): {g}."


def conditioned(prompt: Prompt, score: float, template: str = GOAL_TEMPLATE, system_role: bool = True) -> Prompt:
    """
    A prompt that asks for a quality: in a system message, or at the beginning of the first user message of a
    conversation or of a plain text.

    Example:

    ```python
    >>> conditioned("Name a colour.", 9.0)
    'Requested quality (1-10): 9.\\n\\nName a colour.'
    ```
    """
    return add_goal(prompt, goal_text(score, template), system_role)


def build(
    dataset: Dataset | IterableDataset,
    *,
    score_chosen: str = "score_chosen",
    score_rejected: str = "score_rejected",
    template: str = GOAL_TEMPLATE,
    system_role: bool = True,
    half: bool = False,
    keep_equal: bool = False,
    seed: int = 0,
) -> Dataset | IterableDataset:
    """
    Two rows of each pair: asked for the score of the chosen response the order stays, asked for that of the rejected
    one it is reversed.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Pairs with an explicit `prompt`, conversational or plain. Of a stream the two rows follow each other; else
            all rows of the first kind come first.
        score_chosen, score_rejected (`str`):
            Columns with absolute scores. A pair without both, or whose scores contradict its order, is left out.
        template (`str`, *optional*):
            Text with one slot `{g}`.
        system_role (`bool`, *optional*, defaults to `True`):
            Whether the chat template knows a system message; if not, the first user message begins with the goal.
        half (`bool`, *optional*, defaults to `False`):
            Augments a random half of the pairs, so that there are as many rows as before.
        keep_equal (`bool`, *optional*, defaults to `False`):
            Keeps pairs of equal scores, whose two rows contradict each other, as the reference does.
        seed (`int`, *optional*, defaults to `0`):
            Of `half`.

    Returns:
        The same kind of dataset, with a column `goal`; where the responses are swapped, so are the score columns.

    Raises:
        `ValueError`: if a column is missing, or no pair is left.
    """
    present = column_names(dataset)
    for name in ("prompt", "chosen", "rejected", score_chosen, score_rejected):
        if name not in present:
            raise ValueError(f"Reward-augmented data needs the column {name!r}; there are {sorted(present)}.")
    goal_text(1.0, template)
    settings: dict[str, Any] = {"score_chosen": score_chosen, "score_rejected": score_rejected}
    settings |= {"template": template, "system_role": system_role}
    if isinstance(dataset, IterableDataset):
        if half:
            raise ValueError("half=True draws from all pairs, which a stream does not know: load the dataset whole.")
        arguments = {"settings": settings, "keep_equal": keep_equal}
        return dataset.map(_stream_rows, batched=True, fn_kwargs=arguments, remove_columns=present)
    scores = [numeric_column(dataset, name) for name in (score_chosen, score_rejected)]
    rng = np.random.default_rng(seed)
    ids = augmentable(scores[0], scores[1], keep_equal=keep_equal, half=half, rng=rng)
    if not len(ids):
        raise ValueError(f"No pair has a higher {score_chosen!r} than {score_rejected!r}: nothing can be augmented.")
    rows = unprepared(dataset).select(ids)
    pairs = [_rows(row, **settings) for row in rows]
    return Dataset.from_list([pair[0] for pair in pairs] + [pair[1] for pair in pairs])


def condition(
    dataset: Any, score: float, *, template: str = GOAL_TEMPLATE, system_role: bool = True
) -> Dataset | IterableDataset:
    """
    The dataset with the quality `score` asked for in every prompt: for evaluation, with the best score there is.

    Raises:
        `ValueError`: if it has no column `prompt`.
    """
    if "prompt" not in column_names(dataset):
        raise ValueError(f"Prompts are conditioned, but there are only the columns {sorted(column_names(dataset))}.")
    arguments = {"score": score, "template": template, "system_role": system_role}
    rows = unprepared(dataset) if isinstance(dataset, Dataset) else dataset
    return rows.map(_condition_row, fn_kwargs=arguments)


def knows_system_role(tokenizer: Any) -> bool:
    """Whether a tokenizer's chat template shows a system message; `False` where it refuses or drops it."""
    marker = "quality-of-the-answer"
    messages = [{"role": "system", "content": marker}, {"role": "user", "content": "x"}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception:  # whatever a template raises, it does not know the role
        return False
    user = tokenizer.apply_chat_template([{"role": "user", "content": marker}], tokenize=False)
    # A template that takes a system message for an assistant's does not know it either.
    assistant = tokenizer.apply_chat_template(
        [*messages[1:], {"role": "assistant", "content": marker}], tokenize=False
    )
    before, behind = text[: text.find(marker)], assistant[: assistant.rfind(marker)]
    return marker in text and bool(before) and not behind.endswith(before) and before != user[: user.find(marker)]


def _condition_row(row: Mapping[str, Any], score: float, template: str, system_role: bool) -> dict[str, Any]:
    return {"prompt": conditioned(row["prompt"], score, template, system_role)}


def _rows(
    row: Mapping[str, Any], score_chosen: str, score_rejected: str, template: str, system_role: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    high, low = row[score_chosen], row[score_rejected]
    positive, negative = goal_rows(row, high, low, template, system_role)
    return {**positive, "goal": float(high)}, {
        **negative,
        "goal": float(low),
        score_chosen: low,
        score_rejected: high,
    }


def _stream_rows(batch: Mapping[str, list[Any]], settings: dict[str, Any], keep_equal: bool) -> dict[str, list[Any]]:
    def floats(name: str) -> list[float]:
        return [np.nan if value is None else float(value) for value in batch[settings[name]]]

    ids = augmentable(floats("score_chosen"), floats("score_rejected"), keep_equal=keep_equal)
    rows = [{name: values[i] for name, values in batch.items()} for i in ids.tolist()]
    new = [part for row in rows for part in _rows(row, **settings)]
    return {name: [row[name] for row in new] for name in [*batch, "goal"]}
