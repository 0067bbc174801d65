"""`dsel build`: writes a dataset file that a method would otherwise build inside a run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from accelerate import Accelerator
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from ..data.build import continuations as inco
from ..data.build import guidelines, reward_augmented
from ..data.files import replacing
from ..data.loading import load_splits, take_split
from ..scorers.language_model import LanguageModel
from ..scorers.rewards import load_reward as load_function
from ..scorers.rewards import reward_of, score_responses
from ..trainer.generation import generate

KINDS = ("edge", "inco", "reward-augmented")


@dataclass
class BuildArguments:
    """Data in, data out."""

    dataset_name: str = field(metadata={"help": "A parquet, jsonl or csv file, a folder, a hub id, or `demo`."})
    output_file: str = field(metadata={"help": "The parquet file to write; one that exists is not overwritten."})
    dataset_split: str = field(default="train", metadata={"help": "Split to build from."})
    seed: int = field(default=0, metadata={"help": "Seed of every draw."})


@dataclass
class GoalArguments:
    """Of `dsel build reward-augmented`."""

    score_chosen: str = field(default="score_chosen", metadata={"help": "Column with the score of `chosen`."})
    score_rejected: str = field(default="score_rejected", metadata={"help": "Column with the score of `rejected`."})
    attributes: list[str] | None = field(
        default=None,
        metadata={"help": "Instead, several scores as one goal: words NAME=CHOSEN_COLUMN,REJECTED_COLUMN."},
    )
    template: str = field(default=reward_augmented.GOAL_TEMPLATE, metadata={"help": "Goal text with one slot {g}."})
    system_role: bool = field(default=True, metadata={"help": "Whether the chat template knows system messages."})
    half: bool = field(default=False, metadata={"help": "Augments half of the pairs: as many rows as before."})
    keep_equal: bool = field(default=False, metadata={"help": "Keeps pairs of equal scores."})


@dataclass
class SamplingArguments:
    """Of `dsel build inco`, beside those of its synthesis."""

    model_name_or_path: str = field(metadata={"help": "The policy that continues the responses."})
    reward: str | None = field(default=None, metadata={"help": "Reward function, as module:function."})
    reward_model: str | None = field(default=None, metadata={"help": "Path of a sequence-classification model."})
    response_column: str = field(default="chosen", metadata={"help": "Response of the stronger model."})


@dataclass
class GuidelineArguments:
    """Of `dsel build edge`."""

    model_name_or_path: str = field(metadata={"help": "The model that unfolds, and that the guideline shall help."})
    guideline: str = field(metadata={"help": "The guideline: a text, or the path of a text file."})
    annotate: str = field(metadata={"help": "module:function (guideline, prompts) -> responses."})
    update: str | None = field(
        default=None, metadata={"help": "module:function (guideline, prompts) -> guideline; it stays without."}
    )
    keep: float = field(default=0.25, metadata={"help": "Share of the prompts to keep, in (0, 1]."})
    rounds: int = field(default=1, metadata={"help": "How often to measure and update."})
    max_new_tokens: int = field(default=64, metadata={"help": "Cap on the tokens that the model unfolds."})


def build_file(words: Sequence[str]) -> str:
    """
    Runs `dsel build KIND --key value ...`.

    Args:
        words (`Sequence[str]`):
            The words after `dsel build`.

    Returns:
        `str`: what was written where.

    Raises:
        `ValueError`: for an unknown kind or key, an existing output file, or data that cannot be built from.
    """
    if not words or words[0] not in KINDS:
        raise ValueError(f"dsel build takes one of {', '.join(KINDS)}, got {words[0] if words else 'nothing'!r}.")
    kind, rest = words[0], list(words[1:])
    arguments: dict[str, tuple[Any, ...]] = {
        "edge": (GuidelineArguments,),
        "inco": (SamplingArguments, inco.Synthesis),
        "reward-augmented": (GoalArguments,),
    }
    own: tuple[Any, ...] = (BuildArguments, *arguments[kind])
    parser = HfArgumentParser(own, prog=f"dsel build {kind}", allow_abbrev=False)
    common, *settings, unknown = parser.parse_args_into_dataclasses(rest, return_remaining_strings=True)
    if unknown:
        raise ValueError(f"Unknown argument {unknown[0]!r} of `dsel build {kind}`. See `dsel build {kind} --help`.")
    output = Path(common.output_file)
    if output.exists():
        raise ValueError(f"output_file: {common.output_file!r} exists; nothing was overwritten.")
    splits = load_splits(common.dataset_name)
    dataset = take_split(splits, common.dataset_split, common.dataset_name, "dataset_split")
    build: dict[str, Callable[..., Dataset]] = {
        "edge": _guided,
        "inco": _continuations,
        "reward-augmented": _goals,
    }
    built = build[kind](dataset, common.seed, *settings)
    with replacing(output) as temporary:
        built.to_parquet(str(temporary))
    return f"{len(built)} rows from {len(dataset)}: {output}"


def _goals(dataset: Dataset, seed: int, how: GoalArguments) -> Dataset:
    settings = vars(how)
    if how.attributes is not None:
        words = [word.partition("=") for word in how.attributes]
        settings = settings | {"attributes": {name: columns.split(",") for name, _, columns in words}}
    return reward_augmented.build(dataset, seed=seed, **settings)


def _guided(dataset: Dataset, seed: int, how: GuidelineArguments) -> Dataset:
    accelerator = Accelerator()
    model = LanguageModel(how.model_name_or_path, accelerator.device, "model_name_or_path")
    text = Path(how.guideline)
    guideline = text.read_text(encoding="utf-8") if len(how.guideline) < 256 and text.is_file() else how.guideline

    def measure(contexts: Any, guideline: str) -> Any:
        return guidelines.unfolded_effectiveness(
            contexts,
            [guideline] * len(contexts),
            partial(generate, _holder(model.model, model.tokenizer, accelerator)),
            lambda rows, what: model.mean_losses(rows),
            model.tokenizer,
            max_new_tokens=how.max_new_tokens,
            longest=model.max_length,
        )

    annotate: Any = load_function(how.annotate)
    update: Any = None if how.update is None else load_function(how.update)
    return guidelines.build(
        dataset,
        measure,
        guideline=guideline,
        annotate=annotate,
        update=update,
        keep=how.keep,
        rounds=how.rounds,
    )


def _holder(policy: Any, tokenizer: Any, accelerator: Accelerator) -> Any:
    """What generating needs of a trainer."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return SimpleNamespace(model=policy, model_wrapped=policy, accelerator=accelerator, _tokenizer=tokenizer)


def _continuations(dataset: Dataset, seed: int, model: SamplingArguments, how: inco.Synthesis) -> Dataset:
    if (model.reward is None) == (model.reward_model is None):
        raise ValueError("dsel build inco needs --reward module:function or --reward_model PATH, and not both.")
    if how.balance:
        raise ValueError(f"balance={how.balance} needs the policy's log-probabilities: use the method in a run.")
    accelerator = Accelerator()
    reward = reward_of(model.reward, model.reward_model, accelerator.device)
    tokenizer = AutoTokenizer.from_pretrained(model.model_name_or_path)
    policy = AutoModelForCausalLM.from_pretrained(model.model_name_or_path).to(accelerator.device)
    return inco.build(
        dataset,
        partial(generate, _holder(policy, tokenizer, accelerator)),
        partial(score_responses, reward, description="Scoring candidates"),
        tokenizer,
        synthesis=how,
        response_column=model.response_column,
        seed=seed,
    )
