"""Pairs weighed by how likely the policy is to write them."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...core.method import Method, Run
from ...core.parameters import check_choice, check_range
from ...core.registry import register
from ...functional.margins import valid_pairs
from ...functional.preference.wpo import aligned_logps, wpo_pair_weight
from ...signals.batch import Batch, Signal
from ...signals.pair_batch import PairBatch


@register("wpo")
@dataclass
class Wpo(Method):
    """
    Weighs off-policy pairs by the probability that the current policy would write them.

    What: per token the log-probability less that which the policy expects of its own samples
    (`log sum_v p(v)^2`), averaged per response; the pair's weight is `min(cap, exp(A_chosen + A_rejected))`, a
    constant in the gradient (hf.co/papers/2406.11827). With `cap: null` this is TRL's `use_weighting`; the cap at 1 is
    that of the authors' code. Works with every loss type that treats pairs one by one.
    When: preference data that other models have written.
    When not: weights of unlikely responses are tiny (about e^-10), which slows training: `normalize: mean1` keeps the
    size of a step.
    """

    cap: float | None = field(default=1.0, metadata={"help": "largest weight of a pair; null = no cap"})
    normalize: str = field(default="none", metadata={"help": '"none": weights as they are; "mean1"'})

    signals = (Signal.TOKEN_LOGPS, Signal.LOG_SUM_SQ_PROBS)
    trainers = ("dpo",)
    paper = "hf.co/papers/2406.11827"
    outputs = ("log_sum_sq_probs",)
    selector = "weight"

    def __post_init__(self) -> None:
        if self.cap is not None:
            check_range("cap", self.cap, 0, float("inf"), open_low=True)
        check_choice("normalize", self.normalize, ("none", "mean1"))

    def check(self, run: Run) -> None:
        if getattr(run.arguments, "use_weighting", False):
            raise ValueError("use_weighting=True weighs the pairs already: leave it out, or remove 'wpo'.")

    def score(self, batch: Batch) -> Tensor:
        assert isinstance(batch, PairBatch)
        expected = batch.policy.log_sum_sq_probs
        if expected is None:
            raise ValueError("'wpo' needs the model's fused head, which this model does not have.")
        width = batch.token_mask.shape[1]
        aligned = aligned_logps(batch.policy.log_probs[:, -width:], expected[:, -width:], batch.token_mask)
        chosen, rejected = aligned.chunk(2)
        weights = wpo_pair_weight(chosen, rejected, self.cap)
        # A response without a token says nothing of the policy.
        return torch.where(valid_pairs(batch.chosen_lengths, batch.rejected_lengths), weights, 0.0)

    def weigh(self, batch: Batch) -> Tensor:
        return self.score(batch)
