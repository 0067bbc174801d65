"""Self-play: prompts that the policy rewrites, and pairs of its best and worst response (hf.co/papers/2503.01864)."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets

from ...functional.preference.inco_dpo import choose_pair
from ..responses import Prompt, as_response, message_text, prompts_of, unprepared

REWRITES = (
    "Rewrite this request and add one constraint, in 10 to 20 more words: {prompt}",
    "Rewrite this request so that it goes deeper, in 10 to 20 more words: {prompt}",
    "Rewrite this request with more concrete terms, in 10 to 20 more words: {prompt}",
    "Rewrite this request so that it needs more steps of reasoning, in 10 to 20 more words: {prompt}",
    "Write a new request of the same domain as this one: {prompt}",
)
# A rewrite that is this many times longer or shorter than its prompt is none.
LONGEST = 5


def evolved(
    prompts: list[Prompt],
    generate: Callable[..., list[list[str]]],
    *,
    max_new_tokens: int = 128,
    seed: int = 0,
    **drawn: Any,
) -> list[Prompt]:
    """The policy's rewrites of each prompt, five ways each, without those of very different length."""
    texts = [prompt if isinstance(prompt, str) else message_text(prompt[-1]) for prompt in prompts]
    asked: list[Prompt] = []
    for prompt, text in zip(prompts, texts, strict=True):
        requests = [rewrite.format(prompt=text) for rewrite in REWRITES]
        asked += requests if isinstance(prompt, str) else [[{"role": "user", "content": r}] for r in requests]
    answers = generate(asked, max_new_tokens=max_new_tokens, seed=seed, description="Rewriting prompts", **drawn)
    new: list[Prompt] = []
    for number, (answer,) in enumerate(answers):
        source, text = number // len(REWRITES), answer.strip()
        old = texts[source]
        if LONGEST * len(text) > len(old) and LONGEST * len(old) > len(text):
            prompt = prompts[source]
            new.append(text if isinstance(prompt, str) else [*prompt[:-1], {"role": "user", "content": text}])
    return new


def build(
    dataset: Dataset,
    generate: Callable[..., list[list[str]]],
    score: Callable[[Sequence[Prompt], Sequence[str]], np.ndarray],
    *,
    responses: int = 5,
    temperature: float = 0.8,
    top_p: float = 0.95,
    max_new_tokens: int = 256,
    unfinished: str = "drop",
    evolve: np.ndarray | None = None,
    batch_size: int = 16,
    seed: int = 0,
) -> Dataset:
    """
    The dataset and, behind it, pairs of the policy's own: of `responses` samples the best against the worst.

    Args:
        dataset ([`~datasets.Dataset`]):
            Pairs with `prompt`.
        generate (`Callable`):
            As [`~dsel_trl.trainer.generation.generate`] without its first argument.
        score (`Callable`):
            Rewards of responses to prompts, `(n,)`.
        responses (`int`, *optional*, defaults to `5`):
            Samples per prompt, at least 2.
        temperature, top_p, max_new_tokens, batch_size:
            Of the samples.
        unfinished (`str`, *optional*, defaults to `"drop"`):
            Samples that `max_new_tokens` cuts off count as empty; with `"keep"` they are trained as if they ended.
        evolve (`np.ndarray`, *optional*):
            Rows whose prompts are rewritten by the policy ([`evolved`]); the new pairs are then of those. Defaults to
            new pairs of all prompts as they are.
        seed (`int`, *optional*, defaults to `0`):
            Of the generation.

    Returns:
        [`~datasets.Dataset`]: the dataset's columns and `self_play` (1 for the new pairs, whose other columns than
        `prompt`, `chosen` and `rejected` are empty). A prompt with an empty response, one that was cut off among them,
        or whose responses are scored alike, gives no pair.

    Raises:
        `ValueError`: if no prompt gives a pair.
    """
    if responses < 2:
        raise ValueError(f"responses={responses}: a pair needs at least two.")
    drawn: dict[str, Any] = {
        "temperature": temperature,
        "top_p": top_p,
        "batch_size": batch_size,
        "whole": unfinished == "drop",
    }
    base = unprepared(dataset)
    prompts = prompts_of(base)
    if evolve is not None:
        prompts = evolved([prompts[i] for i in evolve], generate, max_new_tokens=max_new_tokens, seed=seed, **drawn)
    samples: list[list[str]] = []
    if prompts:
        samples = generate(prompts, samples=responses, max_new_tokens=max_new_tokens, seed=seed + 1, **drawn)
    texts = [text for row in samples for text in row]
    owners = [prompt for prompt in prompts for _ in range(responses)]
    scores = score(owners, texts).reshape(-1, responses)
    rows = []
    for prompt, row, values in zip(prompts, samples, scores, strict=True):
        pair = choose_pair(values) if all(text.strip() for text in row) else None
        if pair is not None and row[pair.chosen] != row[pair.rejected]:
            chosen, rejected = (as_response(row[side], prompt) for side in pair)
            rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "self_play": 1})
    if not rows:
        raise ValueError(
            f"None of {len(prompts)} prompts gave a pair: the responses are empty, equal, scored alike, or cut off by "
            f"max_new_tokens={max_new_tokens}."
        )
    marked = base.add_column("self_play", np.zeros(len(base), dtype=np.int64))
    empty = dict.fromkeys(marked.column_names)
    return concatenate_datasets([marked, Dataset.from_list([empty | row for row in rows], features=marked.features)])
