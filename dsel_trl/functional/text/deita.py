"""DEITA: complexity times quality, then a greedy filter for diversity (hf.co/papers/2312.15685)."""

import warnings
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ..ranking import rank_order, selectable

Floats = NDArray[np.float64]
Ids = NDArray[np.int64]

FALLBACK = 3.0
"""Score of an answer in which a digit is missing."""

LLAMA_DIGIT_IDS = (29896, 29906, 29941, 29946, 29945, 29953)
MISTRAL_DIGIT_IDS = (28740, 28750, 28770, 28781, 28782, 28784)
"""Token ids of the digits 1 to 6, in the order of the digits; the ids themselves are not in order."""

ROUNDING = 2.5e-7
"""Two float32 unit vectors that are equal have a cosine of 1 only up to this."""


def digit_logits(logits: Tensor, digit_ids: Sequence[int]) -> Tensor:
    """
    Picks the digits' values out of those of all next tokens.

    Args:
        logits (`torch.Tensor` of shape `(..., V)`):
            Logits or log-probabilities by token id; NaN where a value is missing.
        digit_ids (`Sequence[int]`):
            Token ids of the digits 1, 2, ... in that order, for example `LLAMA_DIGIT_IDS`.

    Returns:
        `torch.Tensor` of shape `(..., len(digit_ids))`.
    """
    return logits[..., list(digit_ids)]


def expected_digit(logits: ArrayLike, fallback: float = FALLBACK) -> Floats:
    """
    Expected score of a scorer that answers with one digit (hf.co/papers/2312.15685, section 2.2).

    The softmax is taken over the digits only, so logits and log-probabilities give the same score.

    Args:
        logits (`array` of shape `(..., V)`):
            Next-token logits of the digits 1 to V, in that order.
        fallback (`float`, *optional*, defaults to `3.0`):
            Score where a digit is NaN (missing).

    Returns:
        `np.ndarray` of float64 of shape `(...)`, in [1, V].

    Example:

    ```python
    >>> from dsel_trl.functional.text.deita import expected_digit

    >>> float(expected_digit([0.0, 0.0, 0.0, 0.0, 0.0, 0.0]))
    3.5
    ```
    """
    values = np.asarray(logits, dtype=np.float64)
    top = values.max(axis=-1, keepdims=True)
    complete = np.isfinite(top[..., 0])
    weights = np.exp(np.where(complete[..., None], values - np.where(np.isfinite(top), top, 0), 0))
    scores = (weights * np.arange(1, values.shape[-1] + 1)).sum(axis=-1) / weights.sum(axis=-1)
    return np.where(complete, scores, fallback)


def conversation_scores(*turn_scores: Sequence[Sequence[float]]) -> Floats:
    """
    Score of every conversation: the product of its scores in each turn, summed over the turns.

    See hf.co/papers/2312.15685, section 2.4. Long conversations score higher by construction.

    Args:
        turn_scores (`Sequence` of `Sequence[float]`, one or more):
            For each kind of score (complexity, quality, ...) the scores of the turns of every conversation.

    Returns:
        `np.ndarray` of float64 of shape `(N,)`: 0 for a conversation without turns.

    Raises:
        `ValueError`: if the kinds disagree about the number of turns.

    Example:

    ```python
    >>> from dsel_trl.functional.text.deita import conversation_scores

    >>> conversation_scores([[2.0, 3.0], [4.0]], [[1.0, 5.0], [0.5]]).tolist()
    [17.0, 2.0]
    ```
    """
    if not turn_scores:
        raise ValueError("pass at least one kind of score, for example complexity and quality")
    n = len(turn_scores[0])
    counts = np.fromiter((len(turns) for turns in turn_scores[0]), dtype=np.int64, count=n)
    product = np.ones(int(counts.sum()))
    for kind in turn_scores:
        other = np.fromiter((len(turns) for turns in kind), dtype=np.int64, count=len(kind))
        if len(other) != n or (other != counts).any():
            where = "" if len(other) != n else f"; conversation {int(np.flatnonzero(other != counts)[0])} differs"
            raise ValueError(f"all kinds of score must have the same turns, got {n} and {len(other)} rows{where}")
        product *= np.fromiter((score for turns in kind for score in turns), dtype=np.float64, count=len(product))
    return np.bincount(np.repeat(np.arange(n), counts), weights=product, minlength=n).astype(np.float64)


def diversity_filter(
    scores: ArrayLike,
    embeddings: ArrayLike,
    *,
    threshold: float = 0.9,
    size: int | None = None,
    batch_size: int | None = None,
    block_size: int = 1024,
) -> Ids:
    """
    Goes through the examples from the best to the worst and keeps those unlike all kept before.

    See hf.co/papers/2312.15685, section 2.4. A candidate is dropped when its cosine similarity to a kept example is
    greater than the threshold; the best example is always kept. No `N x N` matrix is built.

    Args:
        scores (`array` of shape `(N,)`):
            Score of every example. Non-finite ones are not selectable.
        embeddings (`array` of shape `(N, d)`):
            One vector per example. A zero vector counts as similar to nothing.
        threshold (`float`, *optional*, defaults to `0.9`):
            Largest cosine similarity to a kept example.
        size (`int`, *optional*):
            Stop when this many are kept. `None` or -1 is no limit.
        batch_size (`int`, *optional*):
            Judge candidates in groups of this size, as the published code does: each is also compared to the members
            of its group that were dropped, which can drop more. A threshold below 0 then drops all but the best,
            because the published code compares the zeros above the diagonal as well.
        block_size (`int`, *optional*, defaults to `1024`):
            Candidates whose similarities are computed at once; it does not change the result.

    Returns:
        `np.ndarray` of int64: kept ids, best first.

    Raises:
        `ValueError`: if the shapes do not fit or a size is out of range.

    Example:

    ```python
    >>> from dsel_trl.functional.text.deita import diversity_filter

    >>> diversity_filter([3.0, 2.0, 1.0], [[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]]).tolist()
    [0, 2]
    ```
    """
    rows = np.asarray(embeddings)
    order = rank_order(scores)[: int(np.count_nonzero(selectable(scores)))]
    if rows.ndim != 2 or len(rows) != len(np.asarray(scores)):
        raise ValueError(f"got {len(np.asarray(scores))} scores for embeddings of shape {rows.shape}")
    limit = len(order) if size is None or size == -1 else size
    step = block_size if batch_size is None else batch_size
    if limit < 0 or min(step, block_size) < 1:
        raise ValueError(f"got size={size}, batch_size={batch_size}, block_size={block_size}; all must be positive")
    if len(order) == 0:
        return order
    kept = _Kept(rows.shape[1])
    kept.add(order[:1], _unit(rows, order[:1]))
    for start in range(1, len(order), step):
        if len(kept) >= limit:
            break
        block = order[start : start + step]
        unit = _unit(rows, block)
        free = kept.largest_similarity(unit) <= threshold + ROUNDING
        if batch_size is not None:
            free &= (np.tril(unit @ unit.T, k=-1) <= threshold + ROUNDING).all(axis=1)
        else:
            block, unit = block[free], unit[free]
            free = np.ones(len(block), dtype=np.bool_)
            similar = np.tril(unit @ unit.T > threshold + ROUNDING, k=-1)
            # Only rows with a similar predecessor depend on what was decided before them.
            for row in np.flatnonzero(similar.any(axis=1)):
                free[row] = not (similar[row] & free).any()
        kept.add(block[free], unit[free])
    return kept.ids()[: max(1, limit)]


class _Kept:
    """The kept examples and their unit vectors, in a buffer that doubles as it fills."""

    def __init__(self, width: int) -> None:
        self._rows = np.zeros((1024, width), dtype=np.float32)
        self._ids: list[Ids] = []
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def ids(self) -> Ids:
        return np.concatenate(self._ids)

    def add(self, ids: Ids, rows: NDArray[np.float32]) -> None:
        needed = self._count + len(ids)
        if needed > len(self._rows):
            grown = np.zeros((max(needed, 2 * len(self._rows)), self._rows.shape[1]), dtype=np.float32)
            grown[: self._count] = self._rows[: self._count]
            self._rows = grown
        self._rows[self._count : needed] = rows
        self._ids.append(ids)
        self._count = needed

    def largest_similarity(self, rows: NDArray[np.float32], chunk: int = 8192) -> NDArray[np.float32]:
        largest = np.full(len(rows), -np.inf, dtype=np.float32)
        for start in range(0, self._count, chunk):
            similarity = rows @ self._rows[start : min(start + chunk, self._count)].T
            np.maximum(largest, similarity.max(axis=1), out=largest)
        return largest


def _unit(rows: NDArray, ids: Ids) -> NDArray[np.float32]:
    picked = rows[ids].astype(np.float32)
    if not np.isfinite(picked).all():
        bad = ids[~np.isfinite(picked).all(axis=1)]
        raise ValueError(f"the embeddings of ids {bad[:5].tolist()} are not finite")
    norm = np.linalg.norm(picked, axis=1, keepdims=True)
    if (norm == 0).any():
        zero = ids[norm[:, 0] == 0]
        warnings.warn(f"the embeddings of ids {zero[:5].tolist()} are zero: they count as similar to nothing")
    return (picked / np.where(norm > 0, norm, 1)).astype(np.float32, copy=False)
