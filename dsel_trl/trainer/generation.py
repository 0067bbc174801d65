"""Sampling from the policy, for methods that write responses: batched, capped, and outside the gradient step."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from tqdm.auto import tqdm
from trl.models.utils import unwrap_model_for_generation

from ..core.costs import Costs
from ..core.evaluation import evaluation_mode
from ..core.randomness import preserved_rng
from ..data.responses import Prompt, templated

logger = logging.getLogger(__name__)

# What a tokenizer writes for bytes that are no whole character.
REPLACEMENT = "\ufffd"
# Tokens of the prompt that are decoded together with a response.
TAIL = 4


def generate(
    trainer: Any,
    prompts: Sequence[Prompt],
    *,
    samples: int = 1,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_p: float = 1.0,
    prefixes: Sequence[str] | None = None,
    whole: bool = False,
    batch_size: int = 16,
    seed: int = 0,
    description: str = "Generating",
    costs: Costs | None = None,
) -> list[list[str]]:
    """
    Samples responses from the policy as it is now.

    Args:
        trainer ([`~trl.DPOTrainer`] or [`~trl.SFTTrainer`]):
            The run's trainer.
        prompts (`Sequence`):
            Texts, or conversations in TRL's form (then the chat template is applied).
        samples (`int`, *optional*, defaults to `1`):
            Responses per prompt.
        max_new_tokens (`int`, *optional*, defaults to `64`):
            Cap on the tokens of a response.
        temperature (`float`, *optional*, defaults to `1.0`):
            0 is greedy decoding.
        top_p (`float`, *optional*, defaults to `1.0`):
            Share of the probability mass to sample from.
        prefixes (`Sequence[str]`, *optional*):
            Beginnings of the responses, to be continued; the result holds the continuations only.
        whole (`bool`, *optional*, defaults to `False`):
            Gives the empty text for a response that the cap has cut off; how many there were is counted and said.
        batch_size (`int`, *optional*, defaults to `16`):
            Sequences per batch.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draws. The global generators are left as they were.
        costs ([`Costs`], *optional*):
            Where responses and tokens are counted.

    Returns:
        `list[list[str]]`: `samples` texts per prompt, without special tokens and without the first bytes of a
        character that the cap has cut through. All processes get the same.
    """
    tokenizer = trainer._tokenizer
    texts = [templated(tokenizer, prompt) for prompt in prompts]
    if prefixes is not None:
        texts = [text + prefix for text, prefix in zip(texts, prefixes, strict=True)]
    rows = [text for text in texts for _ in range(samples)]
    encoded = [tokenizer(text, add_special_tokens=False)["input_ids"] or [tokenizer.eos_token_id] for text in rows]
    order = sorted(range(len(rows)), key=lambda i: len(encoded[i]))
    kwargs: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    if temperature > 0:
        kwargs |= {"temperature": temperature, "top_p": top_p, "top_k": 0}
    results, generated, cut = [""] * len(rows), 0, 0
    accelerator = trainer.accelerator
    with (
        torch.no_grad(),
        evaluation_mode(trainer.model),
        preserved_rng(),
        unwrap_model_for_generation(trainer.model_wrapped, accelerator) as model,
        accelerator.autocast(),
    ):
        torch.manual_seed(seed)
        ends = _ends(model, tokenizer)
        starts = range(0, len(order), batch_size)
        for start in tqdm(starts, desc=description, disable=not accelerator.is_main_process):
            batch = order[start : start + batch_size]
            width = max(len(encoded[i]) for i in batch)
            # Left padding: a prompt must end where its response begins.
            ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(encoded[i])) + encoded[i] for i in batch])
            mask = torch.tensor([[0] * (width - len(encoded[i])) + [1] * len(encoded[i]) for i in batch])
            device = accelerator.device
            output = model.generate(
                input_ids=ids.to(device), attention_mask=mask.to(device), pad_token_id=tokenizer.pad_token_id, **kwargs
            )
            for i, tokens in zip(batch, output[:, width:].tolist(), strict=True):
                generated += _length(tokens, tokenizer.pad_token_id)
                # Some tokenizers drop white space at the beginning of a text: decode behind the prompt's last tokens.
                before = encoded[i][-TAIL:]
                head = tokenizer.decode(before, skip_special_tokens=True)
                text = tokenizer.decode(before + tokens, skip_special_tokens=True)
                results[i] = text[len(head) :]
                if ends.isdisjoint(tokens):
                    cut += 1
                    results[i] = "" if whole else results[i].rstrip(REPLACEMENT)
    if costs is not None:
        # All processes generate the same: each response counts once.
        costs.add("prompts", len(rows), sum(map(len, encoded)))
        costs.add("generated_responses", len(rows), generated)
        costs.add("cut_responses", cut)
    if whole and cut and accelerator.is_main_process:
        logger.warning(
            "%s: %d of %d responses reached max_new_tokens=%d without an end and are left out.",
            description,
            cut,
            len(rows),
            max_new_tokens,
        )
    return [results[i : i + samples] for i in range(0, len(results), samples)]


def _length(tokens: list[int], pad: int) -> int:
    """Tokens of a response before the padding that fills it up to the longest of its batch."""
    size = len(tokens)
    while size and tokens[size - 1] == pad:
        size -= 1
    return size


def _ends(model: Any, tokenizer: Any) -> set[int]:
    """Tokens at which the model ends a response."""
    own = getattr(model.generation_config, "eos_token_id", None)
    return {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
