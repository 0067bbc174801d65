"""Lengths of examples in tokens, read off the tokenised columns."""

from collections.abc import Sequence

import numpy as np
from datasets import Dataset

from .columns import _arrow_column, list_lengths


def padded_lengths(dataset: Dataset, max_length: int | None, sides: Sequence[str]) -> np.ndarray:
    """
    Tokens of the sequence that a row's sequences are padded to: the longest of its sides, with the prompt.

    Args:
        dataset ([`~datasets.Dataset`]):
            Tokenised rows.
        max_length (`int`, *optional*):
            What a sequence is truncated to when it is collated.
        sides (`Sequence[str]`):
            The responses of a row.

    Returns:
        `np.ndarray` of int32 of shape `(N,)`.
    """
    longest = _prompt_lengths(dataset) + np.max([list_lengths(dataset, f"{side}_ids") for side in sides], axis=0)
    return longest if max_length is None else np.minimum(longest, max_length)


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
    prompt = _prompt_lengths(dataset)
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


def _prompt_lengths(dataset: Dataset) -> np.ndarray:
    if "prompt_ids" in dataset.column_names:
        return list_lengths(dataset, "prompt_ids")
    # Pairs for a reward model hold the prompt in both sides.
    return np.zeros(len(dataset), dtype=np.int32)
