"""The tokens a run trains on, as plain sequences that a pass can score in other contexts."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from .rows import Rows, UnreadableError

IGNORED = -100


class Sequences:
    """
    Token ids and labels of some rows, after the trainer's truncation: what a pass can score in other contexts.

    Args:
        rows ([`~dsel_trl.data.rows.Rows`]):
            Rows with one response each: of pairs, one side.

    Raises:
        `ValueError`: for both sides of pairs at once.
        `UnreadableError`: where the token columns are not there.
    """

    def __init__(self, rows: Rows) -> None:
        if rows.layout.pairs:
            raise ValueError(f"{rows.name} holds pairs: take one side of them, such as rows.side('chosen').")
        # Whether prompts and responses lie in columns of their own and are put together when they are collated.
        self.joins = bool(rows.layout.sides)
        names = [f"{side}_ids" for side in rows.layout.sides] if self.joins else ["input_ids", "labels"]
        if rows.layout.prompts:
            names = ["prompt_ids", *names]
        missing = [name for name in names if name not in rows.column_names]
        if missing:
            raise UnreadableError(f"the prepared dataset has no {missing}, only {sorted(rows.column_names)}.")
        self._rows = rows.dataset.select_columns(names)
        self._names = names
        self._limit = rows.max_length if self.joins else None
        self._from_end = rows.truncation == "keep_end"
        self.pad = rows.tokenizer.pad_token_id or 0
        self.device = rows.device

    def __getitem__(self, ids: np.ndarray) -> list[tuple[list[int], list[int]]]:
        """(token ids, labels) of some examples; the label of a token that is not trained is -100."""
        rows = self._rows.__getitems__(np.asarray(ids).tolist())
        if len(self._names) == 1:
            # A reward model's sequence: no token has a loss of its own.
            (name,) = self._names
            return [(row[name], row[name]) for row in rows]
        first, second = self._names
        if not self.joins:
            return [(row[first], row[second]) for row in rows]
        cut = (
            slice(None) if self._limit is None else slice(-self._limit, None) if self._from_end else slice(self._limit)
        )
        return [((row[first] + row[second])[cut], ([IGNORED] * len(row[first]) + row[second])[cut]) for row in rows]

    def scan(self, block: int = 10_000) -> tuple[np.ndarray, np.ndarray]:
        """Tokens, and trained tokens after the first, of every example: two `(N,)` int64 arrays."""
        totals, trained = [], []
        for start in range(0, len(self._rows), block):
            for tokens, labels in self[np.arange(start, min(start + block, len(self._rows)))]:
                totals.append(len(tokens))
                trained.append(sum(label != IGNORED for label in labels[1:]))
        return np.array(totals, dtype=np.int64), np.array(trained, dtype=np.int64)

    def instruction_lengths(self, block: int = 10_000) -> np.ndarray:
        """Tokens before the first trained one of every example, `(N,)` int64."""
        starts = []
        for first in range(0, len(self._rows), block):
            for tokens, labels in self[np.arange(first, min(first + block, len(self._rows)))]:
                starts.append(len(instruction_alone(0, tokens, labels)[0]))
        return np.array(starts, dtype=np.int64)

    def turn_starts(self, trained: np.ndarray, block: int = 10_000) -> np.ndarray:
        """Whether each trained token, one example after another, is the first of its turn, `(sum(trained),)` bool."""
        starts = np.zeros(int(trained.sum()), dtype=bool)
        place = 0
        for first in range(0, len(self._rows), block):
            for _, labels in self[np.arange(first, min(first + block, len(self._rows)))]:
                scored = np.array([False, *(label != IGNORED for label in labels[1:])], dtype=bool)
                begins = scored[1:] & ~scored[:-1]
                own = begins[scored[1:]]
                starts[place : place + len(own)] = own
                place += len(own)
        return starts

    def collate(
        self, change: Callable[[int, list[int], list[int]], tuple[list[int], list[int]]] | None = None
    ) -> Callable[[np.ndarray], dict[str, Any]]:
        """
        A function that pads some examples into inputs, for a pass.

        Args:
            change (`Callable`, *optional*):
                `change(id, tokens, labels)` gives the tokens and labels to score instead.
        """

        def rows(ids: np.ndarray) -> dict[str, Any]:
            found = self[ids]
            if change is not None:
                found = [change(int(i), *row) for i, row in zip(ids, found, strict=True)]
            return padded(found, self.pad, self.device)

        return rows


def padded(rows: Sequence[tuple[list[int], list[int]]], pad: int, device: Any) -> dict[str, Any]:
    """Token ids and labels as inputs of a causal language model, padded on the right."""
    width = max(2, *(len(tokens) for tokens, _ in rows))
    ids = torch.full((len(rows), width), pad)
    labels = torch.full((len(rows), width), IGNORED)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, (tokens, own) in enumerate(rows):
        ids[i, : len(tokens)] = torch.tensor(tokens, dtype=torch.long)
        labels[i, : len(own)] = torch.tensor(own, dtype=torch.long)
        mask[i, : len(tokens)] = 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device), "labels": labels.to(device)}


def answer_alone(prefix: list[int]) -> Callable[[int, list[int], list[int]], tuple[list[int], list[int]]]:
    """The trained tokens behind `prefix`, without anything else: the same tokens are scored as in their context."""

    def change(i: int, tokens: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
        answer = [label for label in labels[1:] if label != IGNORED]
        return prefix + answer, [IGNORED] * len(prefix) + answer

    return change


def instruction_alone(i: int, tokens: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
    """The tokens before the first trained one, all of them scored: for [`Sequences.collate`]."""
    end = next((place for place, label in enumerate(labels) if label != IGNORED), len(tokens))
    return tokens[:end], tokens[:end]


def start_tokens(tokenizer: Any) -> list[int]:
    """What may stand before a text that has no context: the token that begins (else ends) texts."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        token = getattr(tokenizer, name, None)
        if token is not None:
            return [int(token)]
    raise ValueError("The tokenizer has neither bos, eos nor pad token: an answer alone has nothing to begin with.")
