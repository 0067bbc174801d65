"""The built-in demo model: a tiny Llama with a tokenizer of its own, built and briefly trained on the spot."""

import hashlib
import logging
import os
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ..files import replacing
from .corpus import DemoTask, demo_preferences, draw_tasks

logger = logging.getLogger(__name__)

PAD, END, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<|user|>' + message['content'] + '<|end|>' }}"
    "{% else %}{{ '<|assistant|>' + message['content'] + '<|end|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
VOCABULARY = 1024
WARMUP_TASKS = 3072
BATCH = 32


def _warmup_tasks(seed: int) -> list[DemoTask]:
    """Tasks like those of the corpus; none of its prompts is among them."""
    corpus = demo_preferences(seed)
    taken = {row[0]["content"] for split in corpus.values() for row in split["prompt"]}
    return draw_tasks(WARMUP_TASKS, np.random.default_rng([seed, 2]), taken)


def _build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: any text can be encoded, and the corpus' own words are single tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, END, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _warm_up(model: LlamaForCausalLM, rows: list[list[int]], steps: int, rng: np.random.Generator) -> float:
    """Next-token training on `rows`; returns the mean loss of the last steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps, pct_start=0.1)
    pad = int(model.config.pad_token_id or 0)
    losses: list[float] = []
    model.train()
    # These matrices are too small to share; and with one thread the weights do not depend on the number of cores.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for step in range(steps):
        batch = [rows[position] for position in rng.choice(len(rows), size=BATCH, replace=False)]
        length = max(len(row) for row in batch)
        input_ids = torch.tensor([row + [pad] * (length - len(row)) for row in batch])
        mask = input_ids.ne(pad)
        labels = input_ids.masked_fill(~mask, -100)
        loss = model(input_ids=input_ids, attention_mask=mask.long(), labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 100 == 99:
            logger.info("demo model: step %d of %d, loss %.3f", step + 1, steps, np.mean(losses[-100:]))
    torch.set_num_threads(threads)
    return float(np.mean(losses[-20:]))


def build_demo_model(folder: str | os.PathLike, seed: int = 0, steps: int = 250) -> Path:
    """
    Builds the demo model and its tokenizer, or finds them already built.

    The model is trained for a moment on tasks of the demo families, on correct and corrupted answers in equal parts:
    it knows the format of an answer, but not which of two answers is right. That is left to DPO.

    Args:
        folder (`str` or `os.PathLike`):
            Where the model is saved. If the folder already holds a model of the same seed and steps, it is used as
            it is. It appears at once and complete, or not at all.
        seed (`int`, *optional*, defaults to `0`):
            Seed of weights, tasks and order.
        steps (`int`, *optional*, defaults to `250`):
            Number of training steps.

    Returns:
        `Path`: the folder, ready for `from_pretrained`.

    Raises:
        `FileExistsError`: if `folder` exists and holds something else.
    """
    folder = Path(folder)
    tasks = _warmup_tasks(seed)
    corpus = hashlib.sha256("\n".join(f"{t.prompt}\t{t.good}\t{t.bad}" for t in tasks).encode()).hexdigest()
    stamp = f"seed={seed} steps={steps} corpus={corpus[:16]}"
    if folder.exists():
        marker = folder / "demo_model.txt"
        if marker.is_file() and marker.read_text() == stamp:
            return folder
        raise FileExistsError(
            f"{str(folder)!r} exists and is not the demo model ({stamp}). Remove it, or choose another."
        )
    tokenizer = _build_tokenizer([text for task in tasks for text in (task.prompt, task.good, task.bad)])
    rows = []
    for task in tasks:
        for answer in (task.good, task.bad):
            messages = [{"role": "user", "content": task.prompt}, {"role": "assistant", "content": answer}]
            rows.append(tokenizer.encode(tokenizer.apply_chat_template(messages, tokenize=False)))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    # Weights are drawn from torch's global generator: it is put back as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    loss = _warm_up(model, rows, steps, np.random.default_rng([seed, 3]))
    logger.info("demo model: %d parameters, loss %.3f after %d steps", model.num_parameters(), loss, steps)
    with replacing(folder) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        if not (partial / "config.json").is_file():
            raise RuntimeError("This process may not save a model: only the first one of a launch does.")
        (partial / "demo_model.txt").write_text(stamp)
    return folder
