"""Pairs whose chosen response the policy does not surpass yet."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch

from ...core.charges import Charge
from ...core.method import Method, Run
from ...core.parameters import Reads, check_range, check_whole, given
from ...core.registry import register
from ...data.responses import prompts_of, responses_of
from ...functional.preference.filtered_dpo import surviving_ids, teaches
from ...scorers.rewards import counted, load_reward, reward_of, score_responses
from ...signals.batch import Signal


@register("filtered_dpo")
@dataclass
class FilteredDpo(Method):
    """
    Drops a pair for good as soon as a response of the policy's own beats the chosen one.

    What: before each epoch (from `start_epoch` on) one response to each remaining prompt is sampled from the policy
    and scored, and the pair stays while `reward(sample) - reward(chosen) < threshold` (hf.co/papers/2404.13846). A
    reward that gives nothing drops the pair; if all would be dropped, the last set stays. As in the paper an epoch is
    one pass over what is left, and no pair comes twice in it: training ends after `num_train_epochs` passes, before
    the steps that the trainer had planned (`max_steps`, where it is set, is kept, with a filter before each pass). The
    learning rate's schedule is over the planned steps, those of the first pass times the epochs: it ends before it has
    run down. A choice of ours: the trainer counts its own epochs on, so a pass begins inside of them, up to the
    batches that are fetched ahead before the last pass is trained, and batches at a border hold pairs of both passes.
    When: chosen responses of mixed quality, several epochs, a reward worth trusting.
    When not: it costs one generation per remaining pair and epoch. The samples are as short as `max_new_tokens`, which
    a reward may hold against them or for them.
    """

    reward: Any = field(
        default=None, metadata={"help": "function (prompts, responses) -> floats, or 'module:function'"}
    )
    reward_model: str | None = field(
        default=None, metadata={"help": "instead: folder or hub id of a sequence-classification model"}
    )
    threshold: float = field(default=0.0, metadata={"help": "advantage of the sample from which a pair is dropped"})
    start_epoch: int = field(default=0, metadata={"help": "epoch (pass) before which filtering begins"})
    max_new_tokens: int = field(default=64, metadata={"help": "cap on the tokens of a sample"})
    temperature: float = field(default=1.0, metadata={"help": "of the samples"})
    top_p: float = field(default=1.0, metadata={"help": "share of the probability mass to sample from"})
    generation_batch_size: int = field(default=16, metadata={"help": "prompts per generated batch"})

    signals = (Signal.GENERATION, Signal.TEXT)
    trainers = ("dpo",)
    paper = "hf.co/papers/2404.13846"
    reads: ClassVar[Reads] = {
        "top_p": (given("temperature"),),
    }
    criterion = "external_discrete"
    selector = "threshold"
    charges = (
        Charge("generated_responses", per="example and pass", at_most=True),
        Charge("rewards", per="example and pass", at_most=True),
        Charge("rewards"),
    )
    state = "one byte per example, and two reward columns"
    carry_over = True
    epochs_are_passes = True

    def __post_init__(self) -> None:
        if (self.reward is None) == (self.reward_model is None):
            raise ValueError(f"reward={self.reward!r} and reward_model={self.reward_model!r}: give one of them.")
        if self.reward is not None:
            load_reward(self.reward)
        check_whole("start_epoch", self.start_epoch, 0)
        check_whole("max_new_tokens", self.max_new_tokens, 1, 2**20)
        check_range("temperature", self.temperature, 0, float("inf"), open_high=True)
        check_range("top_p", self.top_p, 0, 1, open_low=True)
        check_whole("generation_batch_size", self.generation_batch_size, 1, 2**20)
        self._left: np.ndarray | None = None
        self._filtered = 0

    def units(self, run: Run) -> dict[str, float]:
        known = super().units(run)
        passes = max(float(np.ceil(run.arguments.num_train_epochs)) - self.start_epoch, 0.0)
        if run.arguments.max_steps > 0:
            # The pairs of a pass are sampled for before they are trained: of the first all, of the next no more than
            # the one before has trained. One more may be fetched ahead.
            passes = 2 + known["candidate"] / max(run.size, 1)
        return {**known, "example and pass": run.size * passes}

    def _wanted(self, run: Run) -> bool:
        """Whether the pass that begins is one to be trained, not one that is fetched ahead behind the last."""
        last = np.inf if run.arguments.max_steps > 0 else np.ceil(run.arguments.num_train_epochs)
        return bool(self.start_epoch < run.passes_begun <= last)

    def select(self, run: Run) -> np.ndarray:
        if self._left is None:
            self._left = np.ones(run.size, dtype=bool)
        # Once a pass, however often its plan is asked for: what is generated is dear.
        if run.passes_begun > self._filtered and self._wanted(run):
            self._filter(run)
            self._filtered = run.passes_begun
        if f"{self.name}_sample" in run.ledger:
            advantage = run.ledger[f"{self.name}_chosen"] - run.ledger[f"{self.name}_sample"]
            run.decide(advantage, "reward of the chosen response less that of a sample")
        return self._left

    def _filter(self, run: Run) -> None:
        assert self._left is not None
        ids, everyone = np.flatnonzero(self._left), prompts_of(run.dataset)
        prompts = [everyone[i] for i in ids]
        samples = run.generate(
            prompts,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            batch_size=self.generation_batch_size,
            seed=run.stream_seed("filtered_dpo/samples", run.passes_begun),
            description="Sampling responses",
        )
        generated = self._rewards(run, prompts, [texts[0] for texts in samples])
        run.ledger.write(f"{self.name}_sample", ids, generated, run.step)
        name = f"{self.name}_chosen"
        if name not in run.ledger:
            responses = responses_of(run.dataset, "chosen", getattr(run.processing_class, "eos_token", None))
            run.ledger.write(name, None, self._rewards(run, everyone, responses), run.step)
        chosen = run.ledger[name][ids]
        left = surviving_ids(ids, teaches(generated, chosen, self.threshold))
        self._left = np.zeros(run.size, dtype=bool)
        self._left[left] = True

    def _rewards(self, run: Run, prompts: list[Any], responses: list[str]) -> np.ndarray:
        """Rewards as the first process has them: what is dropped must be the same everywhere."""
        values = np.zeros(len(responses))
        if run.passes.rank == 0:
            reward = reward_of(self.reward, self.reward_model, run.model.device)
            values = score_responses(counted(run, reward), prompts, responses).astype(np.float64)
        return run.passes.total(torch.from_numpy(values)).cpu().numpy().astype(np.float32)

    def state_dict(self) -> dict[str, Any]:
        return {"filtered": self._filtered, **({} if self._left is None else {"left": self._left})}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._filtered = state["filtered"]
        self._left = state["left"].astype(bool) if "left" in state else None
