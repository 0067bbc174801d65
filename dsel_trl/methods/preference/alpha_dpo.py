"""A target margin per pair that follows its margin over the reference."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ...bases.replaced_loss import Averages, LossForm
from ...core.parameters import check_choice, check_range
from ...core.registry import register
from ...functional.margins import log_ratio_margin
from ...functional.preference.alpha_dpo import alpha_dpo_gate_rows, alpha_margin
from ...functional.running import EmaMoments, ema_update
from ...signals.batch import Batch, Signal
from ...signals.pair_batch import PairBatch


@register("alpha_dpo")
@dataclass
class AlphaDpo(LossForm):
    """
    Trains SimPO with a target margin that is larger for pairs the policy separates better than its reference.

    What: `softplus(-beta * ((alp_w - alp_l) - c))` with `c = alpha * (q - mean) / std + gamma_ratio`, where q is the
    averaged log-ratio margin over the reference, and mean and deviation are moving averages over the batches of all
    processes (hf.co/papers/2410.10148). Exact, as row weights on TRL's sigmoid loss; `alpha: 0` is SimPO.
    When: as SimPO, with a reference at hand.
    When not: other loss types than sigmoid are refused. A micro-batch of one pair is trained as SimPO. TRL's learning
    rates for sums of log-probabilities need not suit averages.
    """

    beta: float = field(default=2.5, metadata={"help": "scale of the averaged margin; 2.5 to 10 in the paper"})
    alpha: float = field(default=0.2, metadata={"help": "how far the target follows the pair; 0.05 to 0.2"})
    gamma_ratio: float = field(default=0.6, metadata={"help": "SimPO's target margin divided by beta; 0.15 to 0.6"})
    decay: float = field(default=0.9, metadata={"help": "share of the old value in the moving averages, in [0, 1)"})
    ema_init: str = field(
        default="first_batch", metadata={"help": '"first_batch", or "zero" as in the authors\' code'}
    )

    signals = (Signal.POLICY_LOGPS, Signal.REF_LOGPS)
    couples = True
    paper = "hf.co/papers/2410.10148"
    state = "two moving averages"

    def __post_init__(self) -> None:
        check_range("beta", self.beta, 0, float("inf"), open_low=True)
        check_range("alpha", self.alpha, 0, float("inf"))
        check_range("decay", self.decay, 0, 1, open_high=True)
        check_choice("ema_init", self.ema_init, ("first_batch", "zero"))
        self._moments = EmaMoments()

    def weigh(self, batch: Batch) -> Tensor:
        assert isinstance(batch, PairBatch)
        averages = Averages.of(batch)
        ratios, own = batch.gather(log_ratio_margin(*averages))
        self._moments = ema_update(self._moments, ratios, self.decay, self.ema_init)
        targets = alpha_margin(ratios, self._moments.mean, self._moments.std, self.alpha, self.gamma_ratio)
        return alpha_dpo_gate_rows(*averages[:2], targets[own], self.beta, **self.stock(batch))

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self._moments.mean, "std": self._moments.std, "updates": self._moments.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._moments = EmaMoments(state["mean"], state["std"], state["updates"])
