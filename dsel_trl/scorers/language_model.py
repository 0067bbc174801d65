"""Another causal language model than the policy, to score with: a small one, a reference, or a scorer."""

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..core.run import Run
from ..data.tokens import IGNORED, padded, start_tokens
from ..signals.batch import Forward
from ..signals.sequence_batch import SequenceBatch
from ..signals.tap import label_log_probs


class LanguageModel:
    """
    A causal language model by folder or hub id, without gradient. Code that comes with a model is never run.

    Args:
        path (`str`):
            Folder or hub id.
        device (`torch.device`, *optional*):
            Where it runs; the CPU by default.
        name (`str`, *optional*, defaults to `"model"`):
            The parameter that named it, for errors.

    Raises:
        `ValueError`: if it cannot be loaded.
    """

    def __init__(self, path: str, device: Any = None, name: str = "model") -> None:
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(path)
            model: Any = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
        except (OSError, ValueError) as error:
            raise ValueError(f"{name}={path!r} cannot be loaded as a causal language model: {error}") from error
        self.model = model.to(device or "cpu").eval().requires_grad_(False)
        self.pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        config = self.model.config.get_text_config()
        self.max_length = int(getattr(config, "max_position_embeddings", 0) or 2048)
        self._selects = "logits_to_keep" in inspect.signature(self.model.forward).parameters

    @torch.no_grad()
    def forward(self, inputs: dict[str, Any], ids: Tensor) -> SequenceBatch:
        """The batch of padded sequences under this model."""
        labels = inputs["labels"]
        output = self.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        return SequenceBatch(ids.to(labels.device), inputs, Forward(label_log_probs(output.logits, labels)))

    @torch.no_grad()
    def next_logits(self, rows: Sequence[list[int]]) -> Tensor:
        """Logits of the token after each of some token lists, `(B, V)` float32."""
        inputs = padded([(row, []) for row in rows], self.pad, self.model.device)
        last = torch.tensor([len(row) - 1 for row in rows], device=self.model.device)
        positions, column = torch.unique(last, return_inverse=True)
        # Only the last tokens go through the head: all logits of a batch would be the largest tensor by far.
        extra = {"logits_to_keep": positions} if self._selects else {}
        logits = self.model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False, **extra
        ).logits
        where = column if self._selects else last
        return logits[torch.arange(len(rows), device=logits.device), where].float()

    def mean_losses(self, rows: Sequence[tuple[list[int], list[int]]], batch_size: int = 16) -> np.ndarray:
        """Mean loss of the labels of (token ids, labels), `(n,)` float64; NaN where nothing is scored."""
        found = []
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            ids = torch.arange(start, start + len(part))
            found.append(self.forward(padded(part, self.pad, self.model.device), ids).loss.double().cpu().numpy())
        scored = [any(label != IGNORED for label in labels[1:]) for _, labels in rows]
        return np.where(scored, np.concatenate(found), np.nan)

    def encode(self, prompt: str, answer: str) -> tuple[list[int], list[int]]:
        """
        Tokens and labels of an answer after its prompt, tokenised apart: the answer's tokens are always the same.

        What is too long loses the beginning of the prompt, then the end of the answer.
        """
        start = start_tokens(self.tokenizer)
        before = self.tokenizer(prompt, add_special_tokens=False)["input_ids"] if prompt else []
        scored = self.tokenizer(answer, add_special_tokens=False)["input_ids"][: self.max_length - 1]
        room = self.max_length - len(scored) - len(start)
        before = start + (before[-room:] if room > 0 else [])
        return before + scored, [IGNORED] * len(before) + scored


def sequence_losses(
    run: Run, rows: Sequence[tuple[list[int], list[int]]], model: LanguageModel, what: str
) -> np.ndarray:
    """Mean loss of the labels of token lists under `model`, `(len(rows),)` float64; NaN where nothing is scored."""
    scored = np.array([any(label != IGNORED for label in labels[1:]) for _, labels in rows], dtype=bool)
    losses = run.passes.measure(
        lambda batch: batch.loss,
        inputs=lambda ids: padded([rows[i] for i in ids], model.pad, model.model.device),
        lengths=np.array([len(tokens) for tokens, _ in rows], dtype=np.int64),
        forward=model.forward,
        description=what,
    )
    return np.where(scored, losses.astype(np.float64), np.nan)
