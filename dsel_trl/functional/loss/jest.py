"""JEST: choose the most learnable examples of a super-batch, jointly or one by one (hf.co/papers/2406.17711)."""

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..ranking import gumbel_top_k

Floats = NDArray[np.float64]
Ids = NDArray[np.int64]

EXCLUDED = 1e8


def learnability(learner_loss: ArrayLike, ref_loss: ArrayLike) -> Floats:
    """
    Learnability of every example: `learner_loss - ref_loss` (hf.co/papers/2406.17711, section 3.2).

    High for what the learner has not learned but the reference shows to be learnable.

    Args:
        learner_loss (`array` of shape `(B,)`):
            Loss under the model in training.
        ref_loss (`array` of shape `(B,)`):
            Loss under the reference model.

    Returns:
        `np.ndarray` of float64 of shape `(B,)`.

    Raises:
        `ValueError`: if the shapes differ.

    Example:

    ```python
    >>> from dsel_trl.functional.loss.jest import learnability

    >>> learnability([3.0, 1.0], [1.0, 4.0]).tolist()
    [2.0, -3.0]
    ```
    """
    learner, reference = np.asarray(learner_loss, dtype=np.float64), np.asarray(ref_loss, dtype=np.float64)
    if learner.shape != reference.shape:
        raise ValueError(f"both models must score the same examples, got {learner.shape} and {reference.shape}")
    return learner - reference


def chunk_size(batch: float, num_chunks: int = 16, *, cover: bool = True) -> int:
    """
    Examples drawn per chunk (hf.co/papers/2406.17711, Algorithm 1).

    Args:
        batch (`float`):
            Examples to draw in all: the candidates times the share that is kept.
        num_chunks (`int`, *optional*, defaults to `16`):
            Chunks in which the batch is drawn.
        cover (`bool`, *optional*, defaults to `True`):
            Rounds up, so that the chunks hold the batch. `False` rounds down, as the paper's arithmetic does, and then
            the chunks can hold less than the batch, or nothing.

    Returns:
        `int`.

    Raises:
        `ValueError`: if `batch` is negative or `num_chunks` is not positive.
    """
    if batch < 0 or num_chunks < 1:
        raise ValueError(f"`batch` must not be negative and `num_chunks` at least 1, got {batch} and {num_chunks}")
    return math.ceil(batch / num_chunks) if cover else int(batch / num_chunks)


def conditional_logits(score_matrix: ArrayLike, chosen: ArrayLike) -> Floats:
    """
    Logits of the next draw given what is already in the batch (hf.co/papers/2406.17711, Algorithm 1).

    Args:
        score_matrix (`array` of shape `(B, B)`):
            Learnability of every pair; the diagonal is that of the example itself.
        chosen (`array` of int of shape `(k,)`):
            Examples that are already chosen.

    Returns:
        `np.ndarray` of float64 of shape `(B,)`; the chosen ones are pushed down by 1e8.

    Raises:
        `ValueError`: if the matrix is not square.
    """
    scores = np.asarray(score_matrix, dtype=np.float64)
    if scores.ndim != 2 or scores.shape[0] != scores.shape[1]:
        raise ValueError(f"`score_matrix` must be square, got shape {scores.shape}")
    taken = np.asarray(chosen, dtype=np.int64)
    logits: Floats = scores.diagonal() + scores[taken].sum(axis=0) + scores[:, taken].sum(axis=1)
    logits[taken] -= EXCLUDED
    return logits


def jest_select(score_matrix: ArrayLike, num_chunks: int, size: int, rng: np.random.Generator) -> Ids:
    """
    Draws a batch chunk by chunk from the joint learnability (hf.co/papers/2406.17711, Algorithm 1).

    For losses that do not couple examples (SFT, DPO) the matrix is diagonal, and [`separable_select`] does the same
    without it.

    Args:
        score_matrix (`array` of shape `(B, B)`):
            Learnability of every pair.
        num_chunks (`int`):
            Number of chunks.
        size (`int`):
            Examples per chunk.
        rng (`np.random.Generator`):
            Source of randomness.

    Returns:
        `np.ndarray` of int64: positions in the super-batch in the order of the draw, at most `B`.

    Raises:
        `ValueError`: if the matrix is not square, or a size is not positive.
    """
    if num_chunks < 1 or size < 1:
        raise ValueError(f"`num_chunks` and `size` must be at least 1, got {num_chunks} and {size}")
    chosen = np.zeros(0, dtype=np.int64)
    total = len(np.asarray(score_matrix))
    for _ in range(num_chunks):
        logits = conditional_logits(score_matrix, chosen)
        logits[chosen] = np.nan
        left = min(size, total - len(chosen))
        if left == 0:
            break
        chosen = np.concatenate([chosen, gumbel_top_k(logits, left, rng=rng)])
    return chosen


def separable_select(
    scores: ArrayLike, k: int, rng: np.random.Generator | None = None, temperature: float = 1.0
) -> Ids:
    """
    Draws a batch by independent learnability: a softmax draw without replacement, greedy at temperature 0.

    Args:
        scores (`array` of shape `(B,)`):
            Learnability of every candidate; non-finite ones are not selectable.
        k (`int`):
            Examples to keep.
        rng (`np.random.Generator`, *optional*):
            Source of randomness. Needed unless `temperature` is 0.
        temperature (`float`, *optional*, defaults to `1.0`):
            1 is the paper's draw, 0 takes the k best.

    Returns:
        `np.ndarray` of int64: positions in the super-batch in the order of the draw.

    Raises:
        `ValueError`: if `rng` is missing.
    """
    return gumbel_top_k(scores, k, temperature=temperature, rng=rng)


def similarity_penalty_matrix(scores: ArrayLike, embeddings: ArrayLike, penalty: float) -> Floats:
    """
    A score matrix that spreads the batch: learnability on the diagonal, `-penalty * cosine` elsewhere.

    Args:
        scores (`array` of shape `(B,)`):
            Learnability of every candidate.
        embeddings (`array` of shape `(B, d)`):
            One vector per candidate; a zero vector is similar to nothing.
        penalty (`float`):
            Weight of the similarity to what is already chosen.

    Returns:
        `np.ndarray` of float64 of shape `(B, B)`.
    """
    rows = np.asarray(embeddings, dtype=np.float64)
    norm = np.linalg.norm(rows, axis=1, keepdims=True)
    unit = rows / np.where(norm > 0, norm, 1)
    matrix: Floats = -penalty * (unit @ unit.T)
    np.fill_diagonal(matrix, np.asarray(scores, dtype=np.float64))
    return matrix
