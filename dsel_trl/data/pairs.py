"""Preference pairs as a file holds them: texts, and the tokens that a model would read."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from tqdm.auto import tqdm

from .columns import plain_column
from .responses import Prompt, message_text, plain_prompt, prompt_text
from .tokens import IGNORED, start_tokens

BLOCK = 1000


class PairTexts:
    """
    Prompts and both responses of a preference dataset, plain or conversational, with or without a column `prompt`.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows with `chosen` and `rejected`: texts or messages. Without `prompt`, what both begin with is the prompt.

    Attributes:
        prompts (`list[str | list[dict]]`):
            Texts, or messages with texts for contents.
        chosen, rejected (`list[str]`):
            The responses.
    """

    def __init__(self, dataset: Dataset) -> None:
        sides = [plain_column(dataset, name) for name in ("chosen", "rejected")]
        named = plain_column(dataset, "prompt") if "prompt" in dataset.column_names else [None] * len(dataset)
        self.prompts: list[Prompt] = []
        self.chosen: list[str] = []
        self.rejected: list[str] = []
        for prompt, chosen, rejected in zip(named, *sides, strict=True):
            common = _common(chosen, rejected) if prompt is None else 0
            whole = plain_prompt(chosen[:common] if prompt is None else prompt)
            self.prompts.append(whole)
            self.chosen.append(_said(chosen[common:]))
            self.rejected.append(_said(rejected[common:]))

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def asked(self) -> list[str]:
        """The prompts as texts."""
        return [prompt_text(prompt) for prompt in self.prompts]


def _common(chosen: Any, rejected: Any) -> int:
    """How much of both responses is their prompt: whole messages, or text up to the last space."""
    shorter = min(len(chosen), len(rejected))
    same = next((i for i in range(shorter) if chosen[i] != rejected[i]), shorter)
    if isinstance(chosen, str):
        return chosen[:same].rfind(" ") + 1
    # Two equal conversations still end in a response.
    return min(same, max(shorter - 1, 0))


def _said(response: Any) -> str:
    return response if isinstance(response, str) else "\n".join(message_text(message) for message in response)


class PairTokens:
    """
    The tokens of pairs as rows of their own: row `2 i` is the chosen response of pair `i` behind its prompt, row
    `2 i + 1` the rejected one. `tokens[ids]` gives (token ids, labels), as [`~dsel_trl.data.tokens.Sequences`] does.

    Args:
        texts ([`PairTexts`]):
            The pairs.
        tokenizer:
            The model's. With `template`, its chat template makes the prompt.
        max_length (`int`):
            Tokens of prompt and response together; what is longer loses its end.
        template (`bool`):
            Whether prompts go through the chat template, texts as what a user says.

    Memory: 4 bytes per token.
    """

    def __init__(self, texts: PairTexts, tokenizer: Any, max_length: int, template: bool) -> None:
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        self.start = start_tokens(tokenizer)
        self._limit = max_length
        end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
        flat: list[np.ndarray] = []
        sizes: list[int] = []
        digest = hashlib.sha256(f"{max_length} {self.start}".encode())
        for first in tqdm(range(0, len(texts), BLOCK), desc="Tokenizing"):
            rows = slice(first, first + BLOCK)
            prompts = [self._prompt(tokenizer, prompt, template) for prompt in texts.prompts[rows]]
            both = [_tokens(tokenizer, side[rows]) for side in (texts.chosen, texts.rejected)]
            for prompt, chosen, rejected in zip(prompts, *both, strict=True):
                for part in (prompt, [*chosen, *end], [*rejected, *end]):
                    flat.append(np.asarray(part, dtype=np.int32))
                    sizes.append(len(part))
                    digest.update(flat[-1].tobytes())
                    digest.update(b"|")
        self._flat = np.concatenate(flat) if flat else np.empty(0, dtype=np.int32)
        self._ends = np.cumsum(sizes, dtype=np.int64)
        self.fingerprint = digest.hexdigest()[:16]
        parts = np.array(sizes, dtype=np.int64).reshape(-1, 3)
        self.lengths = np.minimum(parts[:, :1] + parts[:, 1:], max_length).reshape(-1)
        # Tokens of each response that are left, `(N, 2)`.
        self.responses = np.clip(max_length - parts[:, :1], 0, parts[:, 1:])
        self.truncated = int(np.count_nonzero(self.responses < parts[:, 1:]))

    def _prompt(self, tokenizer: Any, prompt: Prompt, template: bool) -> list[int]:
        if template:
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            return _tokens(tokenizer, [str(text)])[0] or self.start
        own = _tokens(tokenizer, [prompt_text(prompt)])[0]
        return own if own[: len(self.start)] == self.start else self.start + own

    def _part(self, number: int) -> list[int]:
        start = int(self._ends[number - 1]) if number else 0
        return self._flat[start : int(self._ends[number])].tolist()

    def __getitem__(self, ids: np.ndarray) -> list[tuple[list[int], list[int]]]:
        rows = []
        for row in np.asarray(ids).tolist():
            prompt, response = self._part(3 * (row // 2)), self._part(3 * (row // 2) + 1 + row % 2)
            tokens = (prompt + response)[: self._limit]
            rows.append((tokens, ([IGNORED] * len(prompt) + response)[: self._limit]))
        return rows

    def identical(self) -> np.ndarray:
        """Which pairs have two responses that are equal after truncation, `(N,)` bool."""
        same = self.responses[:, 0] == self.responses[:, 1]
        for pair in np.flatnonzero(same).tolist():
            size = int(self.responses[pair, 0])
            same[pair] = self._part(3 * pair + 1)[:size] == self._part(3 * pair + 2)[:size]
        return same


def _tokens(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    return list(tokenizer(list(texts), add_special_tokens=False)["input_ids"]) if len(texts) else []
