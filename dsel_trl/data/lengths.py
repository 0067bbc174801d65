"""Lengths of examples in tokens, read off the tokenised columns."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset

from .columns import _arrow_column, list_lengths


def row_lengths(dataset: Any, kind: str, max_length: int | None) -> tuple[np.ndarray, int]:
    """
    Tokens of the sequence that an example's rows are padded to, after truncation, and the rows per example.

    Args:
        dataset ([`~datasets.Dataset`]):
            Tokenised rows.
        kind (`str`):
            Kind of trainer; the two sequences of a pair (`"dpo"`) are padded to the longer one.
        max_length (`int`, *optional*):
            What a pair is truncated to when it is collated.

    Returns:
        `np.ndarray` of int32 of shape `(N,)`, and 1 or 2.
    """
    if kind != "dpo":
        return list_lengths(dataset, "input_ids"), 1
    prompt, chosen, rejected = (list_lengths(dataset, f"{name}_ids") for name in ("prompt", "chosen", "rejected"))
    longer = prompt + np.maximum(chosen, rejected)
    return longer if max_length is None else np.minimum(longer, max_length), 2


def response_lengths(
    dataset: Dataset, max_length: int | None, sides: Sequence[str] = ("chosen", "rejected")
) -> tuple[np.ndarray, np.ndarray]:
    """
    Completion tokens and trained tokens of each row's tokenised responses, after truncation to `max_length`.

    Args:
        dataset ([`~datasets.Dataset`]):
            Tokenised rows.
        max_length (`int`, *optional*):
            What each response is truncated to, with its prompt.
        sides (`Sequence[str]`, *optional*, defaults to `("chosen", "rejected")`):
            Which responses a row has: both sides of a pair, counted together, or a single `"completion"`.

    Returns:
        Two `int32` arrays of shape `(N,)`.
    """
    # Pairs for a reward model hold the prompt in both sides.
    with_prompt = "prompt_ids" in dataset.column_names
    prompt = list_lengths(dataset, "prompt_ids") if with_prompt else np.zeros(len(dataset), dtype=np.int32)
    totals = np.stack([prompt + list_lengths(dataset, f"{side}_ids") for side in sides])
    if max_length is not None:
        totals = np.minimum(totals, max_length)
    completions = np.maximum(totals - prompt, 0)
    return completions.sum(axis=0, dtype=np.int32), totals.sum(axis=0, dtype=np.int32)


def sequence_lengths(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Tokens that carry loss and all tokens of each tokenised sequence; two `int32` arrays of shape `(N,)`."""
    total = list_lengths(dataset, "input_ids")
    if "labels" not in dataset.column_names:
        return total, total
    labels = _arrow_column(dataset, "labels").combine_chunks().flatten().to_numpy(zero_copy_only=False)
    ends = np.cumsum(total, dtype=np.int64)
    trained = np.concatenate([[0], np.cumsum(labels != -100)])
    return (trained[ends] - trained[ends - total]).astype(np.int32), total
