"""Pairs whose two sides are the same by the time they are trained on."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from .columns import _arrow_column


def identical_pairs(
    dataset: Dataset, sides: tuple[str, str], prompts: bool, max_length: int | None, keep_end: bool
) -> np.ndarray:
    """
    Which tokenized pairs have two sides that are equal after truncation: no preference can be learned from them.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows with `<side>_ids` and, with `prompts`, `prompt_ids` before them.
        sides (`tuple[str, str]`):
            Names of the two responses.
        prompts (`bool`):
            Whether the prompt's tokens lie apart.
        max_length (`int`, *optional*):
            What prompt and response together are truncated to.
        keep_end (`bool`):
            Whether the end of a longer sequence stays, not its start.

    Returns:
        `np.ndarray` of bool of shape `(N,)`. Only pairs whose last tokens agree are compared as a whole.
    """
    starts, lengths, tokens = zip(*(_flat(dataset, f"{side}_ids") for side in sides), strict=True)
    if max_length is None:
        kept = list(lengths)
    elif keep_end:
        kept = [np.minimum(length, max_length) for length in lengths]
        starts = tuple(start + length - left for start, length, left in zip(starts, lengths, kept, strict=True))
    else:
        prompt = _flat(dataset, "prompt_ids")[1] if prompts else 0
        kept = [np.clip(max_length - prompt, 0, length) for length in lengths]
    same = kept[0] == kept[1]
    ids = np.flatnonzero(same & (kept[0] > 0))
    # Most pairs differ in their last token already, or in their first.
    for place in (np.maximum(kept[0] - 1, 0), np.zeros_like(kept[0])):
        ids = ids[tokens[0][(starts[0] + place)[ids]] == tokens[1][(starts[1] + place)[ids]]]
    same[kept[0] > 0] = False
    for i in ids.tolist():
        first, second = (row[start[i] : start[i] + kept[0][i]] for row, start in zip(tokens, starts, strict=True))
        same[i] = np.array_equal(first, second)
    return same


def _flat(dataset: Dataset, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where each row of a list column starts in the tokens of all of them, how many it has, and those tokens."""
    column = _arrow_column(dataset, name)
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy().astype(np.int64)
    tokens = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks]
    starts = np.concatenate([[0], np.cumsum(lengths)])[:-1]
    return starts, lengths, np.concatenate(tokens) if tokens else pa.array([], pa.int64()).to_numpy()
