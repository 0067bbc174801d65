"""Train on the best k of a larger candidate batch."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ...bases.explicit_margin import ExplicitMargin, score_reads
from ...core.charges import Charge
from ...core.method import Run
from ...core.parameters import Reads, check_choice, check_range, check_whole, when
from ...core.registry import register
from ...functional.loss.select_k_of_b import select_k_of_b
from ...signals.batch import Batch, Signal

SCORES = ("loss", "implicit_margin", "explicit_margin", "length")
MODES = ("top_k", "bottom_k", "gumbel_top_k", "epsilon_mix")


@register("select_k_of_b")
@dataclass
class SelectKOfB(ExplicitMargin):
    """
    Draws `factor` times as many candidates as are trained, scores them without gradient, and trains on the best.

    What: the score is the current loss, the implicit margin, an explicit margin (columns, `reward` or `reward_model`),
    or the length; `mode` says how to choose. The choice is over the candidates of all processes and acts at once,
    without sampler lag. Rows that are not chosen count as seen: an epoch has `1 / factor` of the steps. KTO's losses
    are compared at the KL term of the batch trained last.
    When: the choice must follow the model closely. When not: it costs `factor` extra forwards per trained example
    (twice that with a reference model that is not precomputed; none by length or explicit margin); a plan costs none.
    """

    by: str = field(default="loss", metadata={"help": f"score: one of {', '.join(SCORES)}"})
    mode: str = field(default="top_k", metadata={"help": f"one of {', '.join(MODES)}"})
    factor: int = field(default=2, metadata={"help": "candidates drawn for one trained example, at least 2"})
    temperature: float = field(default=0.5, metadata={"help": "gumbel_top_k: draws from softmax(score / temperature)"})
    epsilon: float = field(default=0.1, metadata={"help": "epsilon_mix: chance of a random candidate per slot"})

    signals = (Signal.LOSS,)
    trainers = ("dpo", "sft", "kto")
    reads: ClassVar[Reads] = {
        **score_reads(when("by", "explicit_margin")),
        "temperature": (when("mode", "gumbel_top_k"),),
        "epsilon": (when("mode", "epsilon_mix"),),
    }
    selector = "top_k, gumbel_top_k"
    charges = (
        Charge("forwards", per="candidate", when="by: loss or by: implicit_margin", reference=True),
        *ExplicitMargin.charges,
    )
    cost = "factor candidates per trained example"
    state = "none"

    def __post_init__(self) -> None:
        check_choice("by", self.by, SCORES)
        check_choice("mode", self.mode, MODES)
        check_whole("factor", self.factor, 2, 1024)
        check_range("temperature", self.temperature, 0, float("inf"))
        check_range("epsilon", self.epsilon, 0, 1)
        self.check_reward()

    @property
    def explicit(self) -> bool:
        return self.by == "explicit_margin"

    @property
    def candidates(self) -> int:
        return self.factor

    @property
    def scores_candidates(self) -> bool:
        return self.by in ("loss", "implicit_margin")

    @property
    def references(self) -> bool:
        return self.scores_candidates

    def check(self, run: Run) -> None:
        if self.by == "explicit_margin" and run.trainer != "dpo":
            raise ValueError(f"by={self.by!r} needs preference pairs, but the trainer is {run.trainer!r}.")
        if self.by == "implicit_margin" and run.trainer == "sft":
            raise ValueError(f"by={self.by!r} needs preferences, but the trainer is 'sft'.")

    def value(self, batch: Batch) -> Tensor:
        """The score of each candidate, `(B,)`."""
        if self.by == "explicit_margin":
            return self.batch_margin(batch)
        if self.by == "implicit_margin":
            return batch.implicit_margin
        return batch.loss if self.by == "loss" else batch.lengths.float()

    def pick(self, run: Run, candidates: Batch) -> Tensor:
        scores, _ = candidates.gather(self.value(candidates).float())
        count = len(scores) // self.factor
        positions = select_k_of_b(
            scores.cpu().numpy(),
            count,
            self.mode,
            temperature=self.temperature,
            epsilon=self.epsilon,
            fill=True,
            rng=run.rng("select_k_of_b/pick", run.step, len(scores)),
        )
        ids = candidates.gather(candidates.ids)[0].cpu().numpy()
        rule = f"not picked among its candidates (by={self.by}, {self.mode})"
        run.ledger.decide(self.name, ids, scores.cpu().numpy(), run.step, rule, picks=True)
        return torch.as_tensor(positions[:count].copy())
