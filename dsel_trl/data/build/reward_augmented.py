"""Reward-augmented pairs: each pair twice, with the requested quality in the prompt (hf.co/papers/2410.08067)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset

from ...functional.preference.reward_augmented import Goal, add_goal, augmentable, goal_rows, goal_text
from ..columns import column_names, numeric_column
from ..responses import Prompt, unprepared

GOAL_TEMPLATE = "Requested quality (1-10): {g}."

Attributes = Mapping[str, Sequence[str]]
"""Name of each attribute, and its columns with the scores of the chosen and of the rejected response."""


def conditioned(prompt: Prompt, score: Goal, template: str = GOAL_TEMPLATE, system_role: bool = True) -> Prompt:
    """
    A prompt that asks for a quality: in a system message, or at the beginning of the first user message of a
    conversation or of a plain text. `score` may be a mapping from attributes to the score that is asked of each.

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
    attributes: Attributes | None = None,
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
        attributes (`Attributes`, *optional*):
            Instead of these: several scores as one goal. Their mean must not contradict the order.
        template (`str`, *optional*):
            Text with one slot `{g}`, in whose place stands `9`, or `helpfulness 4, verbosity 2` with attributes.
        system_role (`bool`, *optional*, defaults to `True`):
            Whether the chat template knows a system message; if not, the first user message begins with the goal.
        half (`bool`, *optional*, defaults to `False`):
            Augments a random half of the pairs, so that there are as many rows as before.
        keep_equal (`bool`, *optional*, defaults to `False`):
            Keeps pairs of equal scores, whose two rows contradict each other, as the reference does.
        seed (`int`, *optional*, defaults to `0`):
            Of `half`.

    Returns:
        The same kind of dataset, with a column `goal` (a float, or one by each attribute's name); where the responses
        are swapped, so are the score columns.

    Raises:
        `ValueError`: if a column is missing, or no pair is left.
    """
    present = column_names(dataset)
    columns = score_columns(score_chosen, score_rejected, attributes)
    for name in ("prompt", "chosen", "rejected", *(name for sides in columns.values() for name in sides)):
        if name not in present:
            raise ValueError(f"Reward-augmented data needs the column {name!r}; there are {sorted(present)}.")
    goal_text(1.0, template)
    settings: dict[str, Any] = {"columns": columns, "template": template, "system_role": system_role}
    if isinstance(dataset, IterableDataset):
        if half:
            raise ValueError("half=True draws from all pairs, which a stream does not know: load the dataset whole.")
        arguments = {"settings": settings, "keep_equal": keep_equal}
        return dataset.map(_stream_rows, batched=True, fn_kwargs=arguments, remove_columns=present)
    scores = [
        np.stack([numeric_column(dataset, sides[side]) for sides in columns.values()], axis=1) for side in (0, 1)
    ]
    rng = np.random.default_rng(seed)
    ids = augmentable(scores[0], scores[1], keep_equal=keep_equal, half=half, rng=rng)
    if not len(ids):
        higher, lower = (" and ".join(repr(sides[side]) for sides in columns.values()) for side in (0, 1))
        raise ValueError(f"No pair has a higher {higher} than {lower}: nothing can be augmented.")
    rows = unprepared(dataset).select(ids)
    pairs = [_rows(row, **settings) for row in rows]
    return Dataset.from_list([pair[0] for pair in pairs] + [pair[1] for pair in pairs])


def score_columns(
    score_chosen: str, score_rejected: str, attributes: Attributes | None = None
) -> dict[str, tuple[str, str]]:
    """
    Score columns of the two sides by attribute; without attributes the one pair of columns has the name `""`.

    Raises:
        `ValueError`: if an attribute has not two columns.
    """
    if attributes is None:
        return {"": (score_chosen, score_rejected)}
    for name, sides in attributes.items():
        if isinstance(sides, str) or len(sides) != 2:
            raise ValueError(
                f"attributes: {name!r} has {sides!r}, where two columns must stand: the scores of the chosen and of "
                "the rejected responses."
            )
    if not attributes:
        raise ValueError("attributes={} names none: give each its two columns, or leave it out.")
    return {name: (sides[0], sides[1]) for name, sides in attributes.items()}


def condition(
    dataset: Any, score: Goal, *, template: str = GOAL_TEMPLATE, system_role: bool = True
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


def _condition_row(row: Mapping[str, Any], score: Goal, template: str, system_role: bool) -> dict[str, Any]:
    return {"prompt": conditioned(row["prompt"], score, template, system_role)}


def _rows(
    row: Mapping[str, Any], columns: Mapping[str, tuple[str, str]], template: str, system_role: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    high, low = ({name: float(row[sides[i]]) for name, sides in columns.items()} for i in (0, 1))
    goals: list[Any] = [high[""], low[""]] if "" in columns else [high, low]
    swapped = {side: row[other] for a, b in columns.values() for side, other in ((a, b), (b, a))}
    positive, negative = goal_rows(row, goals[0], goals[1], template, system_role)
    return {**positive, "goal": goals[0]}, {**negative, "goal": goals[1], **swapped}


def _stream_rows(batch: Mapping[str, list[Any]], settings: dict[str, Any], keep_equal: bool) -> dict[str, list[Any]]:
    sides = [
        np.array([batch[names[side]] for names in settings["columns"].values()], dtype=np.float64).T for side in (0, 1)
    ]
    ids = augmentable(sides[0], sides[1], keep_equal=keep_equal)
    rows = [{name: values[i] for name, values in batch.items()} for i in ids.tolist()]
    new = [part for row in rows for part in _rows(row, **settings)]
    return {name: [row[name] for row in new] for name in [*batch, "goal"]}
