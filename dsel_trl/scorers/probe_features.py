"""What a linear probe sees of examples as their texts, without a model: hashed n-grams, projected."""

from typing import NamedTuple

import numpy as np
import torch
from datasets import Dataset

from ..data.columns import column_values, plain_column
from ..data.pairs import PairTexts
from ..data.responses import message_text, plain_prompt, prompt_text
from ..functional.audit.pair_texts import relevance
from ..functional.projection import rademacher
from ..functional.text.dsir import hash_ngrams

FORMS: tuple[tuple[str, ...], ...] = (("chosen", "rejected"), ("prompt", "completion"), ("messages",))
BUCKETS, BLOCK = 4096, 1024


class ProbeRows(NamedTuple):
    """Inputs `(N, d)` and targets `(N, c)` of a linear probe, float64."""

    inputs: np.ndarray
    targets: np.ndarray


def probe_rows(dataset: Dataset, size: int, column: str | None = None) -> ProbeRows:
    """
    Inputs and targets of all rows.

    Of a pair the probe sees what its responses differ in, and is to say 1: the chosen one is better. Of a prompt with
    its response it sees the prompt, and is to say what the response looks like.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows with the columns of one of `FORMS`.
        size (`int`):
            Numbers per text.
        column (`str`, *optional*):
            A column of lists to see instead of the texts: embeddings; of a pair, the difference of both responses.

    Raises:
        `ValueError`: if `column` does not hold lists of one length.
    """
    if "chosen" in dataset.column_names:
        if column is not None:
            return ProbeRows(_vectors(dataset, column), np.ones((len(dataset), 1)))
        texts = PairTexts(dataset)
        return pair_rows(texts.asked, texts.chosen, texts.rejected, size)
    prompts, responses = _sides(dataset)
    if column is not None:
        return ProbeRows(_vectors(dataset, column), text_vectors(responses, size))
    return response_rows(prompts, responses, size)


def pair_rows(prompts: list[str], chosen: list[str], rejected: list[str], size: int) -> ProbeRows:
    """Of pairs: chosen minus rejected of the texts, of their lengths, and of what they have to do with the prompt."""
    own, _ = relevance(prompts, chosen, rejected)
    lengths = [np.log1p([len(text) for text in side]) for side in (chosen, rejected)]
    vectors = text_vectors(chosen, size) - text_vectors(rejected, size)
    return ProbeRows(np.column_stack([vectors, lengths[0] - lengths[1], own]), np.ones((len(prompts), 1)))


def response_rows(prompts: list[str], responses: list[str], size: int) -> ProbeRows:
    """Of prompts and their responses: both as vectors."""
    return ProbeRows(text_vectors(prompts, size), text_vectors(responses, size))


def scaled(rows: ProbeRows, held: ProbeRows, paired: bool) -> tuple[ProbeRows, ProbeRows]:
    """
    Both sets in the scale of the first: unit root mean square of what differs from the mean, and a constant. Pairs
    keep their zero, which stands for two responses that are alike, and have no constant.
    """
    parts = []
    for own, others in zip(rows, held, strict=True):
        middle = np.zeros(own.shape[1]) if paired else own.mean(axis=0)
        scale = np.sqrt(((own - middle) ** 2).mean(axis=0))
        scale[scale < 1e-9] = 1.0
        parts.append([(own - middle) / scale, (others - middle) / scale])
    inputs, targets = parts
    if not paired:
        inputs = [np.column_stack([part, np.ones(len(part))]) for part in inputs]
    return ProbeRows(inputs[0], targets[0]), ProbeRows(inputs[1], targets[1])


def text_vectors(texts: list[str], size: int) -> np.ndarray:
    """Texts by their words and pairs of words: hashed, damped, of length 1, and projected to `(N, size)`, float64."""
    hashed = hash_ngrams(texts, num_buckets=BUCKETS, ngrams=2)
    found = np.zeros((len(texts), size))
    for start in range(0, len(texts), BLOCK):
        counts = np.stack(
            [
                np.bincount(hashed.buckets[hashed.offsets[i] : hashed.offsets[i + 1]], minlength=BUCKETS)
                for i in range(start, min(start + BLOCK, len(texts)))
            ]
        )
        damped = np.log1p(counts)
        damped /= np.maximum(np.linalg.norm(damped, axis=1, keepdims=True), 1e-12)
        found[start : start + len(counts)] = rademacher(torch.from_numpy(damped).float(), size, seed=0).numpy()
    return found


def _sides(dataset: Dataset) -> tuple[list[str], list[str]]:
    if "completion" not in dataset.column_names:
        conversations = plain_column(dataset, "messages")
        asked = [prompt_text(plain_prompt(messages[:-1])) for messages in conversations]
        return asked, [message_text(messages[-1]) for messages in conversations]
    prompts = [prompt_text(plain_prompt(prompt)) for prompt in plain_column(dataset, "prompt")]
    return prompts, [prompt_text(plain_prompt(answer)) for answer in plain_column(dataset, "completion")]


def _vectors(dataset: Dataset, column: str) -> np.ndarray:
    try:
        matrix = np.asarray(column_values(dataset, column, "embedding_column"), dtype=np.float64)
    except (ValueError, TypeError) as error:
        raise ValueError(f"embedding_column={column!r} does not hold vectors of one length: {error}") from error
    if matrix.ndim != 2:
        raise ValueError(f"embedding_column={column!r} has shape {matrix.shape}, not ({len(dataset)}, d).")
    return matrix
