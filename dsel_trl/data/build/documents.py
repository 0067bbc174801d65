"""Documents cut into pieces of power-of-two length, as rows of a dataset."""

from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ...functional.order.dataset_decomposition import decompose
from ..columns import column_values, list_lengths

DOCUMENT_ID = "document_id"
TOKENS_AT_A_TIME = 1000


def document_tokens(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, text_field: str, max_length: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """
    All tokens of all documents, one after another, each document ending in the end-of-text token, and their lengths.

    Text is tokenised again where the trainer has truncated it; otherwise the trainer's tokens are used.

    Args:
        dataset ([`~datasets.Dataset`]):
            The rows as the trainer prepared them.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The trainer's tokenizer.
        text_field (`str`):
            Column of the text.
        max_length (`int`, *optional*):
            What the trainer truncated the tokens to.

    Raises:
        `ValueError`: if the rows are no plain documents, or were truncated and their text is gone.
    """
    structured = [name for name in ("prompt", "completion", "messages") if name in dataset.column_names]
    if structured or _has_masked_labels(dataset):
        what = f"the columns {structured}" if structured else "labels without a loss"
        raise ValueError(
            f"dataset_decomposition cuts plain documents, but this dataset has {what}: prompts and completions cannot "
            'be cut. Use mode="bucket".'
        )
    lengths = list_lengths(dataset, "input_ids")
    truncated = max_length is not None and bool((lengths >= max_length).any())
    if truncated and text_field in dataset.column_names:
        flat, lengths = _tokenize(dataset, tokenizer, text_field)
    elif truncated:
        raise ValueError(
            f"{int((lengths >= max_length).sum())} documents are as long as max_length={max_length}: they may have "
            f"been cut, and there is no column {text_field!r} to read them from. Set max_length=None."
        )
    else:
        column = dataset.select_columns(["input_ids"]).with_format("arrow")[:].column("input_ids").combine_chunks()
        flat = column.flatten().to_numpy(zero_copy_only=False).astype(np.int32)
    return _ended(flat, lengths.astype(np.int64), tokenizer.eos_token_id)


def _has_masked_labels(dataset: Dataset) -> bool:
    if "labels" not in dataset.column_names:
        return False
    labels = dataset.select_columns(["labels"]).with_format("arrow")[:].column("labels").combine_chunks().flatten()
    return bool((labels.to_numpy(zero_copy_only=False) == -100).any())


def _tokenize(dataset: Dataset, tokenizer: Any, text_field: str) -> tuple[np.ndarray, np.ndarray]:
    texts, parts = column_values(dataset, text_field), []
    for start in range(0, len(dataset), TOKENS_AT_A_TIME):
        parts += tokenizer(list(texts[start : start + TOKENS_AT_A_TIME]))["input_ids"]
    lengths = np.fromiter(map(len, parts), dtype=np.int64, count=len(parts))
    return np.concatenate([np.asarray(part, dtype=np.int32) for part in parts]), lengths


def _ended(flat: np.ndarray, lengths: np.ndarray, eos: int) -> tuple[np.ndarray, np.ndarray]:
    """Adds the end-of-text token to the documents that lack it."""
    ends = np.cumsum(lengths)
    last = np.where(lengths > 0, np.append(flat, -1)[np.maximum(ends - 1, 0)], -1)
    lacking = last != eos
    return np.insert(flat, ends[lacking], eos), lengths + lacking


def cut_documents(
    dataset: Dataset,
    flat: np.ndarray,
    lengths: np.ndarray,
    *,
    min_log2: int,
    max_log2: int,
    keep_tail: bool,
    rng: np.random.Generator | None = None,
    positions: np.ndarray | None = None,
) -> Dataset:
    """
    One row per piece: `input_ids`, `labels`, `document_id`, and the numeric columns of its document.

    Args:
        dataset ([`~datasets.Dataset`]):
            One row per document.
        flat (`np.ndarray` of shape `(T,)`):
            Tokens of all documents.
        lengths (`np.ndarray` of shape `(D,)`):
            Tokens of each.
        min_log2, max_log2 (`int`):
            Shortest and longest bucket: a piece has `2**k + 1` tokens, of which `2**k` are predicted.
        keep_tail (`bool`):
            Whether what is left of a document, shorter than the shortest bucket, is a piece too.
        rng (`np.random.Generator`, *optional*):
            Cuts over-long documents at random instead of into the longest pieces.
        positions (`np.ndarray` of shape `(D,)`, *optional*):
            What `document_id` says of each document; by default its number.
    """
    pieces = decompose(lengths, min_log2=min_log2, max_log2=max_log2, rng=rng)
    document, start, size = pieces.document, pieces.start, 2**pieces.bucket + 1
    if keep_tail:
        # A single token predicts nothing.
        tailed = np.flatnonzero(pieces.dropped_tail > 1)
        tails = pieces.dropped_tail[tailed]
        document = np.concatenate([document, tailed])
        start, size = np.concatenate([start, lengths[tailed] - tails]), np.concatenate([size, tails])
        order = np.lexsort((start, document))
        document, start, size = document[order], start[order], size[order]
    if not len(document):
        raise ValueError(
            f"No document has {2**min_log2 + 1} tokens, the shortest piece: lower min_log2={min_log2}, or set "
            "keep_tail=True."
        )
    first = (np.cumsum(lengths) - lengths)[document] + start
    before = np.cumsum(size) - size
    tokens = flat[np.repeat(first - before, size) + np.arange(int(size.sum()))]
    offsets = pa.array(np.append(before, len(tokens)), type=pa.int64())
    sequences = pa.LargeListArray.from_arrays(offsets, pa.array(tokens.astype(np.int64)))
    kinds = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean)
    numeric = [field.name for field in dataset.features.arrow_schema if any(kind(field.type) for kind in kinds)]
    owner = document if positions is None else positions[document]
    columns = {"input_ids": sequences, "labels": sequences, DOCUMENT_ID: pa.array(owner)}
    if numeric:
        kept = dataset.select_columns(numeric).with_format("arrow")[:].take(pa.array(document))
        columns.update({name: kept.column(name).combine_chunks() for name in numeric})
    return Dataset(pa.table(columns))
