"""Distributionally robust DPO as a weight."""

from dataclasses import dataclass, field

from torch import Tensor

from ...core.method import Method
from ...core.parameters import check_range
from ...core.registry import register
from ...functional.preference.dr_dpo import dr_dpo_weights
from ...signals.batch import Batch, Signal


@register("dr_dpo")
@dataclass
class DrDpo(Method):
    """
    Weighs down the pairs that fit worst, as likely flipped.

    What: weights `B * softmax(-loss / beta_prime)` over the global micro-batch: the gradient of Dr. DPO's
    `-beta' log mean exp(-loss / beta')` (hf.co/papers/2407.07880), for any separable loss type. KTO's
    labelled responses are weighed in the same way; their losses lie between 0 and 1, so that at `beta_prime` 1 no
    weight is more than e times another: take a smaller one there.
    When: label noise, batches of 8 pairs or more. When not: with one pair per batch it is plain DPO; hard but right
    pairs are weighed down too.
    """

    beta_prime: float = field(
        default=1.0, metadata={"help": "temperature; infinity is plain DPO, small keeps the best"}
    )

    signals = (Signal.LOSS,)
    trainers = ("dpo", "kto", "reward")
    couples = True
    paper = "hf.co/papers/2407.07880"
    selector = "weight"
    normalize = "none"
    state = "none"

    def __post_init__(self) -> None:
        check_range("beta_prime", self.beta_prime, 0, float("inf"), open_low=True)

    def score(self, batch: Batch) -> Tensor:
        return -batch.loss

    def weigh(self, batch: Batch) -> Tensor:
        losses, own = batch.gather(batch.loss)
        return dr_dpo_weights(losses, self.beta_prime)[own]
