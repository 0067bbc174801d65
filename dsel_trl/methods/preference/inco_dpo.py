"""Pairs whose responses begin as the dataset's and go on as the policy's."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch

from ...core.charges import Charge
from ...core.evaluation import evaluation_mode
from ...core.method import Method, Run
from ...core.parameters import Reads, check_refresh, check_whole, given, without
from ...core.registry import register
from ...data.build.continuations import Synthesis, build
from ...data.columns import refuse_truth
from ...data.responses import Prompt, templated
from ...scorers.rewards import counted, load_reward, reward_of, score_responses
from ...signals.batch import Signal
from ...signals.tap import label_log_probs


@register("inco_dpo")
@dataclass
class IncoDpo(Method):
    """
    Builds pairs in which the policy continues a prefix of the dataset's response.

    A *reconstruction*: the paper's procedure was known from summaries only.

    What: per prompt `samples` responses of the policy and `continuations` of the first `ratio` of the dataset's
    response, all scored by the reward; the best becomes the chosen side, the worst the rejected one
    (hf.co/papers/2503.15880). The prefix trades quality (of a stronger writer) against consistency with the policy;
    `balance` adds the mean token log-probability to the reward. `refresh: epoch` builds anew before each epoch, of the
    policy as it is then; `never` once. A prompt that gives no pair keeps its old one, so that epochs are equally long.
    A candidate that `max_new_tokens` cuts off takes no part: it would be trained as if it ended there. How many there
    were is `cut_responses` in `summary.json`. A prefix ends between two tokens, and never inside a character.
    Ids are rows of the dataset; what the ledger holds of an id is of the pair it had when it was trained.
    When: responses of a stronger model, and a reward worth trusting. When not: it costs `samples + continuations`
    generated responses per prompt and build. As a file: `dsel build inco`.
    """

    reward: Any = field(
        default=None, metadata={"help": "function (prompts, responses) -> floats, or 'module:function'"}
    )
    reward_model: str | None = field(
        default=None, metadata={"help": "instead: folder or hub id of a sequence-classification model"}
    )
    response_column: str = field(default="chosen", metadata={"help": "response whose prefix is continued"})
    ratio: float = field(default=0.5, metadata={"help": "share of the response kept as prefix, in [0, 1]"})
    prefix_tokens: int | None = field(default=None, metadata={"help": "fixed prefix length instead of the share"})
    whole_words: bool = field(default=False, metadata={"help": "cut the prefix back to its last white space"})
    samples: int = field(default=5, metadata={"help": "responses from scratch per prompt"})
    temperature: float = field(default=0.8, metadata={"help": "of the responses from scratch"})
    top_p: float = field(default=0.95, metadata={"help": "share of the probability mass to sample from"})
    continuations: int = field(default=5, metadata={"help": "continuations of the prefix per prompt"})
    continuation_temperature: float = field(default=0.3, metadata={"help": "of the continuations"})
    max_new_tokens: int = field(default=256, metadata={"help": "cap on what is generated per response"})
    balance: float = field(default=0.0, metadata={"help": "weight of the mean token log-probability; 0.05 is usual"})
    rejected_from: str = field(default="all", metadata={"help": '"all" candidates, or only the "on_policy" ones'})
    unfinished: str = field(
        default="drop", metadata={"help": 'candidates cut off by the cap: "drop", or "keep" as if they ended'}
    )
    generation_batch_size: int = field(default=16, metadata={"help": "sequences per generated batch"})
    refresh: int | str = field(default="epoch", metadata={"help": '"epoch": built anew each epoch; "never": once'})

    signals = (Signal.GENERATION, Signal.TEXT)
    trainers = ("dpo",)
    paper = "hf.co/papers/2503.15880 (reconstruction)"
    reads: ClassVar[Reads] = {
        "ratio": (without("prefix_tokens"), given("continuations")),
        "prefix_tokens": (given("continuations"),),
        "whole_words": (given("continuations"),),
        "continuation_temperature": (given("continuations"),),
        "temperature": (given("samples"),),
    }
    family = "raw"
    criterion = "external_discrete"
    selector = "builds the dataset"
    charges = (
        Charge("generated_responses", "samples", per="prompt and build"),
        Charge("generated_responses", "continuations", per="prompt and build", at_most=True),
        Charge("rewards", "samples", per="prompt and build"),
        Charge("rewards", "continuations", per="prompt and build", at_most=True),
        Charge("forwards", "samples + continuations", per="prompt and build", when="balance", at_most=True),
    )
    state = "the dataset of each epoch, on disk"

    def __post_init__(self) -> None:
        if (self.reward is None) == (self.reward_model is None):
            raise ValueError(f"reward={self.reward!r} and reward_model={self.reward_model!r}: give one of them.")
        if self.reward is not None:
            load_reward(self.reward)
        check_refresh(self.refresh, ("epoch", "never"))
        if self.prefix_tokens is not None:
            check_whole("prefix_tokens", self.prefix_tokens, 0)
        for name, low in (("samples", 0), ("continuations", 0), ("max_new_tokens", 1), ("generation_batch_size", 1)):
            check_whole(name, getattr(self, name), low, 2**20)
        refuse_truth(self.response_column)
        self.rebuilds_each_epoch = self.refresh == "epoch"
        self._synthesis = Synthesis(
            ratio=self.ratio,
            prefix_tokens=self.prefix_tokens,
            whole_words=self.whole_words,
            samples=self.samples,
            temperature=self.temperature,
            top_p=self.top_p,
            continuations=self.continuations,
            continuation_temperature=self.continuation_temperature,
            max_new_tokens=self.max_new_tokens,
            balance=self.balance,
            rejected_from=self.rejected_from,
            unfinished=self.unfinished,
            batch_size=self.generation_batch_size,
        )

    def units(self, run: Run) -> dict[str, float]:
        builds = int(np.ceil(run.epochs)) if self.rebuilds_each_epoch else 1
        return {**super().units(run), "prompt and build": run.size * builds}

    def rebuild(self, run: Run, dataset: Any) -> Any:

        def mean_logps(prompts: Any, responses: Any) -> np.ndarray:
            return np.array([_mean_logp(run, p, r) for p, r in zip(prompts, responses, strict=True)])

        return build(
            dataset,
            run.generate,
            partial(
                score_responses,
                counted(run, reward_of(self.reward, self.reward_model, run.model.device)),
                description="Scoring candidates",
            ),
            run.processing_class,
            synthesis=self._synthesis,
            response_column=self.response_column,
            mean_logps=mean_logps,
            keep_rows=True,
            seed=run.stream_seed("inco_dpo/synthesis", run.epoch),
        )


@torch.no_grad()
def _mean_logp(run: Run, prompt: Prompt, response: str) -> float:
    """Mean token log-probability of a response under the policy as it is."""
    tokenizer = run.processing_class
    text = templated(tokenizer, prompt)
    start = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    ids = tokenizer(text + response, add_special_tokens=False, return_tensors="pt")["input_ids"].to(run.model.device)
    labels = ids.clone()
    labels[:, :start] = -100
    with evaluation_mode(run.model):
        logps = label_log_probs(run.model(input_ids=ids).logits, labels)
    run.costs.add("forwards", 1, ids.numel())
    return float(logps.sum() / max(int((labels[:, 1:] != -100).sum()), 1))
