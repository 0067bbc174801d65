"""Scores of responses by a reward: a Python function of the user's, or a sequence-classification model."""

import hashlib
import importlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file
from tqdm.auto import tqdm

from ..core.cache import kept, model_fingerprint
from ..data.files import save_arrays
from ..data.responses import Prompt, prompt_text, prompts_of, responses_of

Reward = Callable[[list[Prompt], list[str]], Sequence[float]]

# Batches between two saves of an unfinished scoring.
SAVE_EVERY = 50


def load_reward(spec: str | Reward) -> Reward:
    """
    The reward function that `spec` names.

    Args:
        spec (`str` or `Callable`):
            A function of prompts and responses that returns one float per response, or `"module:function"`. A prompt
            is the dataset's (a text, or a list of messages), a response always a text.

    Raises:
        `ValueError`: if there is no such module or function, or it cannot be called.

    Example:

    ```python
    >>> load_reward(lambda prompts, responses: [float(len(r)) for r in responses])(["a"], ["four"])
    [4.0]
    ```
    """
    if callable(spec):
        return spec
    module_name, colon, attribute = str(spec).partition(":")
    if not colon or not module_name or not attribute:
        raise ValueError(f"reward={spec!r} is neither a function nor 'module:function'.")
    try:
        target: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"reward={spec!r}: the module {module_name!r} cannot be imported ({error}). It must be on PYTHONPATH."
        ) from error
    for name in attribute.split("."):
        if not hasattr(target, name):
            raise ValueError(f"reward={spec!r}: {module_name!r} has no {attribute!r}.")
        target = getattr(target, name)
    if not callable(target):
        raise ValueError(f"reward={spec!r} is a {type(target).__name__}, not a function.")
    return target


class RewardModel:
    """
    A sequence-classification model of one label as a reward function. Code that comes with a model is never run.

    Args:
        path (`str`):
            Folder or hub id.
        device (`torch.device`, *optional*):
            Where it runs; the CPU by default.
        max_length (`int`, *optional*, defaults to `2048`):
            Longer texts are cut at their beginning, so that the response stays.

    Raises:
        `ValueError`: if the model cannot be loaded or has more than one label.
    """

    def __init__(self, path: str, device: Any = None, max_length: int = 2048) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(path)
            self.model = AutoModelForSequenceClassification.from_pretrained(path).to(device or "cpu").eval()
        except (OSError, ValueError) as error:
            raise ValueError(f"reward_model={path!r} cannot be loaded: {error}") from error
        if self.model.config.num_labels != 1:
            raise ValueError(f"reward_model={path!r} has {self.model.config.num_labels} labels, a reward has one.")
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        if self.model.config.pad_token_id is None:
            self.model.config.pad_token_id = self.tokenizer.pad_token_id
        self.tokenizer.truncation_side = "left"
        self.max_length = max_length
        self.tokens = 0

    def text(self, prompt: Prompt, response: str) -> str:
        """What the model reads: through its chat template if it has one, else prompt and response in a row."""
        if self.tokenizer.chat_template is None:
            return prompt_text(prompt) + response
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        answered = [*messages, {"role": "assistant", "content": response}]
        return str(self.tokenizer.apply_chat_template(answered, tokenize=False))

    @torch.no_grad()
    def __call__(self, prompts: list[Prompt], responses: list[str]) -> list[float]:
        texts = [self.text(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
        batch = self.tokenizer(
            texts,
            padding=True,
            truncation=True,
            max_length=self.max_length,
            add_special_tokens=self.tokenizer.chat_template is None,
            return_tensors="pt",
        )
        batch.pop("token_type_ids", None)
        self.tokens += int(batch["attention_mask"].sum())
        return self.model(**batch.to(self.model.device)).logits[:, 0].float().tolist()


def score_responses(
    reward: Reward,
    prompts: Sequence[Prompt],
    responses: Sequence[str],
    *,
    batch_size: int = 16,
    description: str = "Rewards",
    quiet: bool = False,
    partial: Path | None = None,
) -> np.ndarray:
    """
    Rewards of all responses, `(n,)` float32, in batches of similar length; NaN where the reward gives none.

    Args:
        reward (`Callable`):
            From [`load_reward`], or a [`RewardModel`].
        prompts, responses (`Sequence`):
            What to score.
        batch_size (`int`, *optional*, defaults to `16`):
            Responses per call.
        description (`str`, *optional*, defaults to `"Rewards"`):
            Text of the progress bar; `quiet` hides it.
        partial (`Path`, *optional*):
            Where an unfinished scoring is kept and taken up again.

    Raises:
        `ValueError`: if the reward returns another number of values.
    """
    values = np.full(len(responses), np.nan, dtype=np.float32)
    done = np.zeros(len(responses), dtype=bool)
    if partial is not None and partial.is_file():
        saved = load_file(partial)
        if len(saved["done"]) == len(done):
            values, done = saved["values"], saved["done"].astype(bool)
    lengths = [-len(prompt) - len(response) for prompt, response in zip(prompts, responses, strict=True)]
    order = [i for i in np.argsort(lengths, kind="stable").tolist() if not done[i]]
    starts = range(0, len(order), batch_size)
    for count, start in enumerate(tqdm(starts, desc=description, disable=quiet)):
        batch = order[start : start + batch_size]
        got = list(reward([prompts[i] for i in batch], [responses[i] for i in batch]))
        if len(got) != len(batch):
            raise ValueError(f"The reward gave {len(got)} values for {len(batch)} responses, not one for each.")
        values[batch] = [np.nan if value is None else float(value) for value in got]
        done[batch] = True
        if partial is not None and count % SAVE_EVERY == SAVE_EVERY - 1:
            save_arrays(partial, {"values": values, "done": done})
    return values


def reward_of(spec: Any, model_path: str | None, device: Any = None) -> Reward:
    """The reward that a method's parameters `reward` and `reward_model` name."""
    return load_reward(spec) if model_path is None else RewardModel(model_path, device)


def counted(run: Any, reward: Reward) -> Reward:
    """The same reward, whose calls are counted among the run's costs: for what every process scores whole."""

    def scored(prompts: list[Prompt], responses: list[str]) -> Sequence[float]:
        before = tokens_read(reward)
        values = reward(prompts, responses)
        run.costs.add("rewards", len(responses), tokens_read(reward) - before)
        return values

    return scored


def tokens_read(reward: Reward) -> int:
    """Tokens that a reward model has read so far; a function reads none."""
    return reward.tokens if isinstance(reward, RewardModel) else 0


def dataset_rewards(run: Any, sides: Sequence[str], spec: Any, model_path: str | None) -> dict[str, np.ndarray]:
    """
    Rewards of the responses in the columns `sides` of the run's dataset, each `(N,)` float32.

    A reward model's are kept under `output_dir/selection`, also while they are unfinished. Each process scores its
    share.
    """
    prompts, end = prompts_of(run.dataset), getattr(run.processing_class, "eos_token", None)
    reward = reward_of(spec, model_path, run.model.device)
    found = {}
    for side in sides:
        responses = responses_of(run.dataset, side, end)
        if not isinstance(reward, RewardModel):
            found[side] = _scored(run, reward, prompts, responses, side)
            continue
        stem = f"rewards-{side}-{_content(prompts, responses, reward)}"
        rank, world = run.passes.rank, run.world
        partial = Path(run.output_dir) / "selection" / f"{stem}-{rank}of{world}.part"
        score = lambda of=responses, side=side, partial=partial: {  # noqa: E731
            "values": _scored(run, reward, prompts, of, side, partial)
        }
        found[side] = kept(run, stem, score)["values"]
        partial.unlink(missing_ok=True)
    return found


def _content(prompts: list[Prompt], responses: list[str], reward: RewardModel) -> str:
    """Hash of all that a reward model's scores depend on: neither the policy nor a seed is among it."""
    digest = hashlib.sha256(f"{model_fingerprint(reward.model)} {reward.max_length}".encode())
    for prompt, response in zip(prompts, responses, strict=True):
        digest.update(json.dumps([prompt, response]).encode())
    return digest.hexdigest()[:16]


def _scored(
    run: Any, reward: Reward, prompts: list[Prompt], responses: list[str], side: str, partial: Path | None = None
) -> np.ndarray:
    """Rewards of all responses, `(N,)` float32, of which each process scores its share."""
    rank, world = run.passes.rank, run.world
    own, before = np.arange(rank, run.size, world), tokens_read(reward)
    values = score_responses(
        reward,
        [prompts[i] for i in own],
        [responses[i] for i in own],
        description=f"Rewards of {side}",
        quiet=rank > 0,
        partial=partial,
    )
    everything = np.zeros(run.size, dtype=np.float64)
    everything[own] = values
    tokens = tokens_read(reward) - before
    if world > 1:
        everything = run.passes.total(torch.from_numpy(everything)).cpu().numpy()
        tokens = int(run.passes.total(torch.tensor([tokens])))
    run.costs.add("rewards", run.size, tokens)
    return everything.astype(np.float32)
