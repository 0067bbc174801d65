"""DSIR: resample raw text so that its n-grams look like those of a target (hf.co/papers/2302.03169)."""

import hashlib
import re
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..ranking import gumbel_top_k, top_k

Floats = NDArray[np.float64]
Ids = NDArray[np.int64]

WORDS = re.compile(r"\w+|[^\w\s]+")
SMALLEST = 1e-8
REMEMBERED = 2_000_000


class HashedNgrams(NamedTuple):
    """The hashed n-grams of many texts, one after another: text i owns `buckets[offsets[i]:offsets[i + 1]]`."""

    buckets: NDArray[np.int32]
    offsets: Ids
    num_words: Ids


def tokenize_words(text: str) -> list[str]:
    """
    Splits lower-cased text into runs of word characters and runs of punctuation.

    Args:
        text (`str`):
            Any text.

    Returns:
        `list[str]`.

    Example:

    ```python
    >>> from dsel_trl.functional.text.dsir import tokenize_words

    >>> tokenize_words("Buy now!!!")
    ['buy', 'now', '!!!']
    ```
    """
    return WORDS.findall(text.lower())


def hash_bucket(ngram: str, num_buckets: int = 10_000) -> int:
    """
    Bucket of an n-gram: its SHA-256 as a number, modulo the number of buckets.

    Args:
        ngram (`str`):
            Tokens joined by single spaces.
        num_buckets (`int`, *optional*, defaults to `10000`):
            Number of buckets.

    Returns:
        `int` in `[0, num_buckets)`.
    """
    return int.from_bytes(hashlib.sha256(ngram.encode("utf-8", "surrogatepass")).digest(), "big") % num_buckets


def hash_ngrams(texts: Iterable[str], *, num_buckets: int = 10_000, ngrams: int = 2) -> HashedNgrams:
    """
    Hashes all n-grams of all texts (hf.co/papers/2302.03169, section 3).

    Args:
        texts (`Iterable[str]`):
            Texts.
        num_buckets (`int`, *optional*, defaults to `10000`):
            Number of buckets.
        ngrams (`int`, *optional*, defaults to `2`):
            Longest n-gram; all shorter ones count as well.

    Returns:
        `HashedNgrams`: buckets as int32, so a text costs four bytes per n-gram.

    Raises:
        `ValueError`: if `num_buckets` or `ngrams` is not positive.
    """
    if num_buckets < 1 or ngrams < 1:
        raise ValueError(f"`num_buckets` and `ngrams` must be at least 1, got {num_buckets} and {ngrams}")
    # N-grams repeat far more often than they are new, and SHA-256 is the expensive part.
    known: dict[str, int] = {}
    buckets: list[NDArray[np.int32]] = []
    sizes, words = [0], []
    for text in texts:
        tokens = tokenize_words(text)
        row = []
        for n in range(1, ngrams + 1):
            for gram in tokens if n == 1 else map(" ".join, zip(*(tokens[i:] for i in range(n)), strict=False)):
                bucket = known.get(gram)
                if bucket is None:
                    if len(known) >= REMEMBERED:
                        known.clear()
                    bucket = known[gram] = hash_bucket(gram, num_buckets)
                row.append(bucket)
        buckets.append(np.array(row, dtype=np.int32))
        sizes.append(len(row))
        words.append(len(tokens))
    flat = np.concatenate(buckets) if buckets else np.zeros(0, dtype=np.int32)
    return HashedNgrams(flat, np.cumsum(sizes, dtype=np.int64), np.array(words, dtype=np.int64))


def bucket_counts(buckets: ArrayLike, num_buckets: int) -> Ids:
    """
    How often each bucket occurs.

    Args:
        buckets (`array` of int of any length):
            Buckets of the n-grams of one text, or of all of them.
        num_buckets (`int`):
            Number of buckets.

    Returns:
        `np.ndarray` of int64 of shape `(num_buckets,)`.
    """
    return np.bincount(np.asarray(buckets, dtype=np.int64), minlength=num_buckets).astype(np.int64)


def bucket_distribution(hashed: HashedNgrams, num_buckets: int, *, smoothing: float = 0.0) -> Floats:
    """
    Distribution of all n-grams over the buckets.

    Args:
        hashed (`HashedNgrams`):
            Result of [`hash_ngrams`].
        num_buckets (`int`):
            Number of buckets.
        smoothing (`float`, *optional*, defaults to `0.0`):
            Added to every count before normalising (for the target only, in the paper's code).

    Returns:
        `np.ndarray` of float64 of shape `(num_buckets,)`: sums to 1, or is all zero if there is no n-gram at all.

    Raises:
        `ValueError`: if `smoothing` is negative.
    """
    if smoothing < 0:
        raise ValueError(f"`smoothing` must not be negative, got {smoothing}")
    counts = bucket_counts(hashed.buckets, num_buckets).astype(np.float64) + smoothing
    total = counts.sum()
    return counts / total if total > 0 else counts


def log_importance_weights(hashed: HashedNgrams, raw: ArrayLike, target: ArrayLike) -> Floats:
    """
    Log importance weight of every text: how much likelier its n-grams are in the target (hf.co/papers/2302.03169, 3).

    It is a sum over the n-grams, not a mean: long texts have extreme weights.

    Args:
        hashed (`HashedNgrams`):
            N-grams of the raw texts.
        raw (`array` of shape `(num_buckets,)`):
            Distribution of the raw data.
        target (`array` of shape `(num_buckets,)`):
            Distribution of the target data.

    Returns:
        `np.ndarray` of float64 of shape `(N,)`: 0 for an empty text.

    Raises:
        `ValueError`: if the distributions differ in size.
    """
    p, q = np.asarray(raw, dtype=np.float64), np.asarray(target, dtype=np.float64)
    if p.shape != q.shape:
        raise ValueError(f"`raw` has {len(p)} buckets, `target` has {len(q)}")
    gain = np.log(q + SMALLEST) - np.log(p + SMALLEST)
    n = len(hashed.num_words)
    row = np.repeat(np.arange(n), np.diff(hashed.offsets))
    return np.bincount(row, weights=gain[hashed.buckets], minlength=n).astype(np.float64)


def dsir_select(
    log_weights: ArrayLike,
    k: int,
    *,
    rng: np.random.Generator | None = None,
    noise: ArrayLike | None = None,
    greedy: bool = False,
    num_words: ArrayLike | None = None,
    min_words: int = 0,
) -> Ids:
    """
    Draws `k` texts without replacement in proportion to their importance weights (hf.co/papers/2302.03169, section 3).

    Args:
        log_weights (`array` of shape `(N,)`):
            Result of [`log_importance_weights`].
        k (`int`):
            How many texts to draw.
        rng (`np.random.Generator`, *optional*):
            Source of randomness. Needed unless `noise` or `greedy` is given.
        noise (`array` of shape `(N,)`, *optional*):
            Gumbel(0, 1) noise to use instead of drawing.
        greedy (`bool`, *optional*, defaults to `False`):
            Take the `k` largest weights, without noise.
        num_words (`array` of shape `(N,)`, *optional*):
            Words per text, for the length filter.
        min_words (`int`, *optional*, defaults to `0`):
            Shorter texts are not selectable. The paper uses 100.

    Returns:
        `np.ndarray` of int64: ids in the order of the draw; empty if nothing is selectable.

    Raises:
        `ValueError`: if `min_words` is given without `num_words`, or there is no source of randomness.
    """
    weights = np.asarray(log_weights, dtype=np.float64)
    if min_words > 0:
        if num_words is None:
            raise ValueError(f"`min_words={min_words}` needs `num_words`")
        weights = np.where(np.asarray(num_words) >= min_words, weights, np.nan)
    return top_k(weights, k) if greedy else gumbel_top_k(weights, k, rng=rng, noise=noise)


def inverse_probability_weights(probabilities: ArrayLike, clip: float = 10.0) -> Floats:
    """
    Weights that undo a sampling distribution: `1 / (n p)`, clipped, mean 1.

    Args:
        probabilities (`array` of shape `(n,)`):
            Sampling probabilities, for example `softmax_weights(scores, temperature)`.
        clip (`float`, *optional*, defaults to `10.0`):
            Largest weight before normalising.

    Returns:
        `np.ndarray` of float64 of shape `(n,)`: averages 1.

    Raises:
        `ValueError`: if `clip` is not positive or a probability is negative.
    """
    p = np.asarray(probabilities, dtype=np.float64)
    if not clip > 0:
        raise ValueError(f"`clip` must be positive, got {clip}")
    if (p < 0).any():
        raise ValueError(f"probabilities must not be negative, got {p.min()}")
    with np.errstate(divide="ignore"):
        weights = np.minimum(1 / (len(p) * p), clip)
    normalised: Floats = weights / weights.mean()
    return normalised
