"""GREATS: of an oversized batch, the part whose gradients help a target most together."""

import logging
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...bases.influence import FollowsGradient, length
from ...core.charges import Charge
from ...core.method import Run
from ...core.parameters import check_choice, check_whole
from ...core.registry import register
from ...functional.influence.greats import direction_terms, greedy_selection, step_terms
from ...signals.batch import Batch, Signal
from ...signals.ghost import GradientRequest

SCALES = ("rate", "mean", "cosine")


@register("greats")
@dataclass
class Greats(FollowsGradient):
    """
    Draws `factor` times as many candidates as are trained, and takes those that together lower a target's loss most.

    What: the change of the target's mean loss by a step on a part of the candidates, in a Taylor model with the
    identity for the Hessian: each candidate's gradient times the target's, less what it shares with those chosen
    before, one after the other (GREATS, NeurIPS 2024). `scale` says how the two weigh: `rate` (the paper: the learning
    rate), `mean` (the learning rate over the number chosen, as a step on their mean has it), `cosine` (gradients of
    length 1, of which what is shared counts `1 / k`): with usual learning rates the second term of the first two is
    lost beside the first, and the choice is the top by alignment.
    The choice is over the candidates of all processes, each of which works out all of them, and acts at once. Rows
    that are not chosen count as seen: an epoch has `1 / factor` of the steps.
    When: a small clean target, a mixed or noisy pool. When not: where the passes cost more than they gain: each
    candidate has a forward and a backward of its own.
    Memory: inputs and output gradients of the layers for all candidates at once. Measured (`benchmarks/influence.py`,
    SFT of 8 x 256 tokens, a Llama of 6 million parameters, one core, `factor: 2`): 3.8 times a stock step, 1.5 times
    its peak memory.
    """

    factor: int = field(default=2, metadata={"help": "candidates drawn for one trained example, at least 2"})
    scale: str = field(default="rate", metadata={"help": "rate, mean or cosine: how alignment and overlap weigh"})

    signals = (Signal.INFLUENCE,)
    family = "reduction"
    criterion = "external_continuous"
    selector = "greedy, of a candidate batch"
    charges: ClassVar[tuple[Charge, ...]] = (
        Charge("gradients", per="candidate", when="precondition: none", reference=True),
        # Those of the first step are taken as they come.
        Charge("gradients", per="candidate", when="precondition: adam", at_most=True, reference=True),
        Charge("gradients", per="target example and refresh", reference=True),
    )
    cost = "factor candidates per trained example"
    state = "the target's gradient between two refreshes"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("factor", self.factor, 2, 1024)
        check_choice("scale", self.scale, SCALES)
        self._asked_at = -1
        self._asked: dict[str, Tensor] | None = None

    @property
    def candidates(self) -> int:
        return self.factor

    @property
    def scores_candidates(self) -> bool:
        return False

    def pick(self, run: Run, candidates: Batch) -> Tensor:
        ids = candidates.gather(candidates.ids)[0].cpu().numpy()
        count = max(1, len(ids) // self.factor)
        # The micro-batches of a step are picked before any of them is trained: one gradient serves all of them.
        if self._asked_at != run.step:
            self._asked_at, self._asked = run.step, self.direction(run)
        if self._asked is None:
            run.tell(
                f"{self.name}:unscaled",
                f"{self.name!r}: Adam knows nothing before its first step, whose candidates are taken as they come.",
                logging.INFO,
            )
            return torch.arange(count)
        request = GradientRequest(self.layers, directions={"target": self._asked}, gram=True)
        ((_, found),) = run.gradients.each(run.rows, ids, request, everywhere=True)
        alignment, interaction = found.dot("target"), found.gram
        if self.scale == "cosine":
            terms = direction_terms(alignment, interaction, length(self._asked), count)
        else:
            rate = run.gradients.learning_rate / (count if self.scale == "mean" else 1)
            terms = step_terms(alignment, interaction, rate)
        rule = f"not chosen among its candidates (scale={self.scale})"
        run.ledger.decide(self.name, ids, terms[0].cpu().numpy(), run.step, rule, picks=True)
        return greedy_selection(*terms, count)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._asked_at = -1
