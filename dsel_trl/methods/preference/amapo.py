"""Pairs below the batch's mean margin get a target margin of their own."""

from dataclasses import dataclass, field

from torch import Tensor

from ...bases.replaced_loss import Averages, LossForm
from ...core.parameters import check_range
from ...core.registry import register
from ...functional.preference.amapo import amapo_gate_rows, amapo_margin
from ...signals.batch import Batch, Signal
from ...signals.pair_batch import PairBatch


@register("amapo")
@dataclass
class Amapo(LossForm):
    """
    Trains on averaged log-probabilities, with a target margin for the pairs below the batch's mean margin.

    What: `softplus(-(beta * u - g))` with `u = alp_w - alp_l` and `g = beta * exp(((mean - u) / std) * mean)` where u
    is below the mean of the micro-batch over all processes, else 0 (hf.co/papers/2511.09385). Exact, as row weights on
    TRL's sigmoid loss.
    When: pairs of very different difficulty in one batch, 8 pairs or more.
    When not: while the mean margin is negative weaker pairs get a smaller target (as in the authors' code). A
    micro-batch of one pair has no target. Other loss types than sigmoid are refused.
    """

    beta: float = field(default=3.0, metadata={"help": "scale of the averaged margin; 2 to 3 in the paper"})
    max_exponent: float | None = field(
        default=10.0, metadata={"help": "largest exponent; null = none (authors' code)"}
    )

    signals = (Signal.POLICY_LOGPS,)
    couples = True
    paper = "hf.co/papers/2511.09385"
    state = "none"

    def __post_init__(self) -> None:
        check_range("beta", self.beta, 0, float("inf"), open_low=True)

    def weigh(self, batch: Batch) -> Tensor:
        assert isinstance(batch, PairBatch)
        averages = Averages.of(batch)
        gaps, own = batch.gather(averages.policy_chosen - averages.policy_rejected)
        targets = amapo_margin(gaps, self.beta, self.max_exponent)
        return amapo_gate_rows(gaps[own], targets[own], self.beta, **self.stock(batch))
