"""Pairs of continuations: the policy goes on where a prefix of a response ends (hf.co/papers/2503.15880)."""

import itertools
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset

from ...functional.preference.inco_dpo import balanced_scores, choose_pair, prefix_length
from ..columns import column_values
from ..responses import UNFINISHED, Prompt, as_response, prompts_of, response_text, unprepared

JOINER = "\u200d"
SKIN_COLOURS = "\U0001f3fb\U0001f3fc\U0001f3fd\U0001f3fe\U0001f3ff"


@dataclass(frozen=True)
class Synthesis:
    """
    How candidates are made and which of them become a pair.

    Args:
        ratio (`float`, *optional*, defaults to `0.5`):
            Share of the dataset's response that is kept as a prefix; 0 is pure on-policy, 1 pure off-policy.
        prefix_tokens (`int`, *optional*):
            Fixed length of the prefix, instead of a share.
        whole_words (`bool`, *optional*, defaults to `False`):
            Cuts the prefix back to its last white space.
        samples, temperature, top_p:
            Responses from scratch per prompt (5), and how they are drawn (0.8, 0.95).
        continuations, continuation_temperature:
            Continuations per prompt (5), and their lower temperature (0.3).
        max_new_tokens (`int`, *optional*, defaults to `256`):
            Cap on what is generated per response.
        balance (`float`, *optional*, defaults to `0.0`):
            Weight of the mean token log-probability beside the reward when the chosen side is picked.
        rejected_from (`str`, *optional*, defaults to `"all"`):
            `"all"` candidates, or only the `"on_policy"` ones.
        unfinished (`str`, *optional*, defaults to `"drop"`):
            Candidates that `max_new_tokens` cuts off take no part; with `"keep"` they are trained as if they ended.
        batch_size (`int`, *optional*, defaults to `16`):
            Sequences per generated batch.
    """

    ratio: float = 0.5
    prefix_tokens: int | None = None
    whole_words: bool = False
    samples: int = 5
    temperature: float = 0.8
    top_p: float = 0.95
    continuations: int = 5
    continuation_temperature: float = 0.3
    max_new_tokens: int = 256
    balance: float = 0.0
    rejected_from: str = "all"
    unfinished: str = "drop"
    batch_size: int = 16

    def __post_init__(self) -> None:
        prefix_length(1, self.ratio, self.prefix_tokens)
        if self.rejected_from not in ("all", "on_policy"):
            raise ValueError(f"rejected_from={self.rejected_from!r} is neither 'all' nor 'on_policy'.")
        if self.samples < 0 or self.continuations < 0 or self.samples + self.continuations < 1:
            raise ValueError(f"samples={self.samples}, continuations={self.continuations}: nothing would be written.")
        if self.rejected_from == "on_policy" and self.samples < 1:
            raise ValueError(f"rejected_from='on_policy' needs samples, but samples={self.samples}.")
        if self.unfinished not in UNFINISHED:
            raise ValueError(f"unfinished={self.unfinished!r} is none of {', '.join(UNFINISHED)}.")
        if self.max_new_tokens < 1 or self.balance < 0:
            raise ValueError(f"max_new_tokens={self.max_new_tokens}, balance={self.balance}: both must be positive.")


def prefix_of(response: str, tokenizer: Any, synthesis: Synthesis) -> str:
    """The beginning of a response that is kept: cut between two tokens of the policy, never inside a character."""
    tokens = tokenizer(response, add_special_tokens=False)["input_ids"]
    count = prefix_length(len(tokens), synthesis.ratio, synthesis.prefix_tokens)
    if count == len(tokens):
        return response
    # A token may be a part of a character: what is decoded of it is not of the response.
    decoded = tokenizer.decode(tokens[:count], skip_special_tokens=True)
    same = (a == b for a, b in zip(decoded, response, strict=False))
    end = sum(itertools.takewhile(bool, same))
    if tokenizer.is_fast and count:
        offsets = tokenizer(response, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        end = min(offsets[count - 1][1], offsets[count][0])
    text = response[: _character_bound(response, end)]
    if synthesis.whole_words and count:
        text = text[: max(text.rfind(" "), text.rfind("\n"), 0)]
    return text


def _character_bound(text: str, end: int) -> int:
    """The last place up to `end` that does not cut off an accent, a skin colour or a part of a joined emoji."""
    while 0 < end < len(text) and (_continues(text[end]) or text[end - 1] == JOINER):
        end -= 1
    return end


def _continues(character: str) -> bool:
    return character == JOINER or unicodedata.category(character).startswith("M") or character in SKIN_COLOURS


def build(
    dataset: Dataset,
    generate: Callable[..., list[list[str]]],
    score: Callable[[Sequence[Prompt], Sequence[str]], np.ndarray],
    tokenizer: Any,
    *,
    synthesis: Synthesis | None = None,
    response_column: str = "chosen",
    mean_logps: Callable[[Sequence[Prompt], Sequence[str]], np.ndarray] | None = None,
    keep_rows: bool = False,
    seed: int = 0,
) -> Dataset:
    """
    One pair per prompt out of samples of the policy and continuations of a prefix of the dataset's response.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows with `prompt` and the response of a stronger model.
        generate (`Callable`):
            As [`~dsel_trl.trainer.generation.generate`] without its first argument.
        score (`Callable`):
            Rewards of responses to prompts, `(n,)`; a candidate without one takes no part.
        tokenizer:
            The policy's.
        synthesis ([`Synthesis`], *optional*):
            How candidates are made and chosen.
        response_column (`str`, *optional*, defaults to `"chosen"`):
            The response whose prefix is kept.
        mean_logps (`Callable`, *optional*):
            Mean token log-probability of responses under the policy; needed where `synthesis.balance` is not 0.
        keep_rows (`bool`, *optional*, defaults to `False`):
            Keeps the old pair of a prompt that gives no new one, so that the number of rows stays.
        seed (`int`, *optional*, defaults to `0`):
            Of the generation.

    Returns:
        [`~datasets.Dataset`]: `prompt`, `chosen`, `rejected`, `score_chosen`, `score_rejected`, `prefix_share` (of the
        chosen side's characters) and `synthesized` (0 for an old pair), beside the other columns of the dataset.

    Raises:
        `ValueError`: if a column is missing, or no prompt gives a pair.
    """
    how = synthesis or Synthesis()
    responses = column_values(dataset, response_column, f"response_column={response_column!r}")
    if how.balance and mean_logps is None:
        raise ValueError(f"balance={how.balance} needs the policy's log-probabilities: pass mean_logps.")
    prompts = prompts_of(dataset)
    end = getattr(tokenizer, "eos_token", None)
    prefixes = [prefix_of(response_text(value, end), tokenizer, how) for value in responses]
    drawn: dict[str, Any] = {
        "top_p": how.top_p,
        "max_new_tokens": how.max_new_tokens,
        "batch_size": how.batch_size,
        "whole": how.unfinished == "drop",
    }
    candidates: list[list[str]] = [[] for _ in prompts]
    if how.samples:
        fresh = generate(prompts, samples=how.samples, temperature=how.temperature, seed=seed, **drawn)
        candidates = [list(texts) for texts in fresh]
    candidates = _continued(candidates, prompts, prefixes, responses, generate, how, drawn, seed, end)
    owner = np.repeat(np.arange(len(prompts)), [len(texts) for texts in candidates])
    texts = [text for row in candidates for text in row]
    rewards = score([prompts[i] for i in owner], texts)
    rewards = np.where([bool(text.strip()) for text in texts], rewards, np.nan)
    scores = rewards.astype(np.float64)
    if how.balance:
        assert mean_logps is not None
        scores = balanced_scores(rewards, mean_logps([prompts[i] for i in owner], texts), how.balance)
    rows = []
    for i, row in enumerate(dataset):
        own = np.flatnonzero(owner == i) if len(owner) else np.empty(0, dtype=np.int64)
        fresh_only = np.arange(len(own)) < how.samples if how.rejected_from == "on_policy" else None
        pair = choose_pair(rewards[own], scores[own], fresh_only)
        new = None if pair is None else _pair(prompts[i], texts, rewards, own, pair, len(prefixes[i]), how)
        if new is not None:
            rows.append({**row, **new})
        elif keep_rows:
            old = {name: row.get(name) for name in ("score_chosen", "score_rejected")}
            rows.append({**row, **old, "prefix_share": 0.0, "synthesized": 0})
    if not any(row["synthesized"] for row in rows):
        raise ValueError(
            "No prompt gave a pair: all candidates are empty, equal, scored alike, or cut off by "
            f"max_new_tokens={how.max_new_tokens}."
        )
    return unprepared(Dataset.from_list(rows))


def _continued(
    candidates: list[list[str]],
    prompts: list[Prompt],
    prefixes: list[str],
    responses: Any,
    generate: Callable[..., list[list[str]]],
    how: Synthesis,
    drawn: dict[str, Any],
    seed: int,
    end: str | None,
) -> list[list[str]]:
    """The candidates and, behind them, the continued prefixes."""
    whole = [prefix == response_text(value, end) for prefix, value in zip(prefixes, responses, strict=True)]
    open_ends = [i for i, done in enumerate(whole) if not done]
    for i, done in enumerate(whole):
        if done and prefixes[i]:
            candidates[i].append(prefixes[i])  # nothing is left to be continued
    if not (how.continuations and open_ends):
        return candidates
    continued = generate(
        [prompts[i] for i in open_ends],
        prefixes=[prefixes[i] for i in open_ends],
        samples=how.continuations,
        temperature=how.continuation_temperature,
        seed=seed + 1,
        **drawn,
    )
    for i, texts in zip(open_ends, continued, strict=True):
        # A continuation that is empty leaves a response that stops in the middle.
        candidates[i].extend(prefixes[i] + text for text in texts if text.strip())
    return candidates


def _pair(
    prompt: Prompt, texts: list[str], rewards: np.ndarray, own: np.ndarray, pair: Any, prefix: int, how: Synthesis
) -> dict[str, Any] | None:
    chosen, rejected = own[pair.chosen], own[pair.rejected]
    if texts[chosen] == texts[rejected]:
        return None
    continued = pair.chosen >= how.samples
    return {
        "chosen": as_response(texts[chosen], prompt),
        "rejected": as_response(texts[rejected], prompt),
        "score_chosen": float(rewards[chosen]),
        "score_rejected": float(rewards[rejected]),
        "prefix_share": prefix / max(len(texts[chosen]), 1) if continued else 0.0,
        "synthesized": 1,
    }
