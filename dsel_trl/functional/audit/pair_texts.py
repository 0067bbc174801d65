"""What the texts of preference pairs tell without any model: repeats, contradictions, and ties to the prompt."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

WORDS = re.compile(r"\w+")
# Letters by which words of one family are known (plan, planning).
STEM = 4
RELEVANCE = ("prompt_share", "prompt_covered", "prompt_stems", "prompt_rarest", "prompt_plain_share")
SHARED = ("overlap", "rare_overlap")


class Repeats(NamedTuple):
    """
    Attributes:
        identical (`np.ndarray` of bool of shape `(N,)`): Both responses are the same text.
        duplicate (`np.ndarray` of int64 of shape `(N,)`): The first pair of the same texts in the same order; -1 for
            a pair that repeats none.
        contradicts (`np.ndarray` of int64 of shape `(N,)`): The first pair of the same texts with the other label;
            -1 where there is none.
    """

    identical: NDArray[np.bool_]
    duplicate: NDArray[np.int64]
    contradicts: NDArray[np.int64]


def _plain(text: str) -> str:
    return " ".join(text.split())


def _words(text: str) -> frozenset[str]:
    return frozenset(WORDS.findall(text.lower()))


def repeats(prompts: Sequence[str], chosen: Sequence[str], rejected: Sequence[str]) -> Repeats:
    """
    Which pairs say the same twice, and which the opposite of each other. White space does not count.

    Args:
        prompts, chosen, rejected (`Sequence[str]` of length `N`):
            The texts.

    Returns:
        [`Repeats`]. Time and memory: one dictionary entry per pair.
    """
    first: dict[tuple[str, str, str], int] = {}
    keys = [tuple(map(_plain, texts)) for texts in zip(prompts, chosen, rejected, strict=True)]
    duplicate = np.full(len(keys), -1, dtype=np.int64)
    for i, (prompt, one, other) in enumerate(keys):
        found = first.setdefault((prompt, one, other), i)
        if found != i:
            duplicate[i] = found
    contradicts = np.full(len(keys), -1, dtype=np.int64)
    identical = np.array([one == other for _, one, other in keys], dtype=bool)
    for i, (prompt, one, other) in enumerate(keys):
        if not identical[i]:
            contradicts[i] = first.get((prompt, other, one), -1)
    return Repeats(identical, duplicate, contradicts)


def groups_of(prompts: Sequence[str]) -> NDArray[np.int64]:
    """A number for each distinct prompt, `(N,)` int64, from 0: pairs that must be held out together."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(_plain(prompt), len(numbers)) for prompt in prompts], dtype=np.int64)


def compared_elsewhere(prompts: Sequence[str], chosen: Sequence[str], rejected: Sequence[str]) -> NDArray[np.float32]:
    """
    What the other comparisons of the same two responses say of a pair, as in a tournament of several models' answers.

    Args:
        prompts, chosen, rejected (`Sequence[str]` of length `N`):
            The texts. White space does not count.

    Returns:
        `np.ndarray` of float32 of shape `(N,)`, in (-2, 2): a response's wins less its losses against third responses
        to its prompt, over one more than their number, chosen minus rejected. The pair's own label has no part in it;
        0 where neither response is compared with a third one.
    """
    numbers: dict[tuple[str, str], int] = {}
    first, second = (
        np.array(
            [
                numbers.setdefault((_plain(prompt), _plain(text)), len(numbers))
                for prompt, text in zip(prompts, side, strict=True)
            ],
            dtype=np.int64,
        )
        for side in (chosen, rejected)
    )
    won, met = np.bincount(first, minlength=len(numbers)), np.bincount(second, minlength=len(numbers))
    # What copies of the pair say is its own label again, or a contradiction that is told apart.
    forth = first < second
    _, same = np.unique(np.stack([np.minimum(first, second), np.maximum(first, second)]), axis=1, return_inverse=True)
    copies = np.bincount(same)[same]
    lead = np.bincount(same, np.where(forth, 1.0, -1.0))[same] * np.where(forth, 1.0, -1.0)
    one = (won[first] - met[first] - lead) / (won[first] + met[first] - copies + 1)
    other = (won[second] - met[second] + lead) / (won[second] + met[second] - copies + 1)
    # A response that is compared with itself tells nothing.
    return np.where(first == second, 0.0, one - other).astype(np.float32)


def relevance(
    prompts: Sequence[str], chosen: Sequence[str], rejected: Sequence[str]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """
    How much each response has to do with its prompt, by the words they share; rare words count more.

    Args:
        prompts, chosen, rejected (`Sequence[str]` of length `N`):
            The texts. A word's weight is `log(texts / texts that hold it)` over all of them.

    Returns:
        `tuple`: chosen minus rejected, `(N, 5)` in the order of `RELEVANCE`: share of the response's weight that is
        the prompt's, share of the prompt's weight that is answered, share of the prompt's stems of four letters, the
        rarest shared word, and the share of words; and `(N, 2)` in the order of `SHARED`: overlap of both responses,
        plain and by weight.
    """
    # The words are found twice: kept, they would need kilobytes per text.
    counts: Counter[str] = Counter()
    for text in chain(prompts, chosen, rejected):
        counts.update(_words(text))
    total = max(1, 3 * len(prompts))
    weight = {word: math.log(total / count) for word, count in counts.items()}
    differences = np.zeros((len(prompts), len(RELEVANCE)), dtype=np.float32)
    shared = np.zeros((len(prompts), len(SHARED)), dtype=np.float32)

    def size(words: frozenset[str]) -> float:
        # The order of a set differs between processes: the sum must not.
        return math.fsum(weight[word] for word in words)

    def stems(words: frozenset[str]) -> set[str]:
        return {word[:STEM] for word in words if len(word) >= STEM}

    for i, texts in enumerate(zip(prompts, chosen, rejected, strict=True)):
        prompt, one, other = map(_words, texts)
        asked, roots = size(prompt), stems(prompt)
        sides = []
        for words in (one, other):
            common = prompt & words
            told = size(common)
            sides.append(
                (
                    told / max(size(words), 1e-9),
                    told / max(asked, 1e-9),
                    len(roots & stems(words)) / max(1, len(roots)),
                    max((weight[word] for word in common), default=0.0),
                    len(common) / max(1, len(words)),
                )
            )
        differences[i] = np.subtract(sides[0], sides[1])
        both, either = one & other, one | other
        shared[i] = len(both) / max(1, len(either)), size(both) / max(size(either), 1e-9)
    return differences, shared
