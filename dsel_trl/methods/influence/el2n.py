"""EL2N: how far the policy's prediction is from the label, averaged over the visits."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...bases.visits import OverVisits
from ...core.method import Run
from ...core.parameters import check_choice
from ...core.registry import register
from ...functional.influence.el2n import pair_el2n, token_el2n, token_mean
from ...signals.batch import Batch, Signal
from ...signals.pair_batch import PairBatch
from ...signals.sequence_batch import SequenceBatch

FORMS = ("pair", "sequence")


@register("el2n")
@dataclass
class El2n(OverVisits):
    """
    Chooses examples by how far the policy's prediction is from the label.

    What: `form: sequence` is the distance `|p - onehot(y)|` of each label token's distribution from its label, in
    [0, 1.42], averaged over the tokens (of a pair: those of the chosen response); `form: pair` takes a pair for a
    choice between two, `sqrt(2) * (1 - sigmoid(margin))` (hf.co/papers/2107.07075). Averaged over an example's visits,
    which count only within the first share `window` of the training: EL2N is meant to be read early.
    `action` says what to do about it: the paper keeps the highest (keep_top); of noisy labels the very highest are
    noise, which a `band` leaves out.
    When: many epochs over clean labels, of which the easy ones teach little any more. When not: alone, for
    instruction tuning, it is often no better than a random choice; with flipped labels the highest scores are the
    flipped ones (take `keep_bottom` or a `band`). Scores are live: the first epoch's choice is random.
    Memory: measured (`benchmarks/influence.py`, SFT of 8 x 256 tokens, a Llama of 6 million parameters, one core):
    1.09 times a stock step, 1.00 times its peak memory.
    """

    form: str | None = field(
        default=None, metadata={"help": '"pair" or "sequence"; default what the trainer trains: pairs or sequences'}
    )
    signals = (Signal.LOG_SUM_SQ_PROBS, Signal.IMPLICIT_MARGIN)
    trainers = ("dpo", "sft", "reward")
    paper = "hf.co/papers/2107.07075"
    selector = "top_k, band, weight, sample, curriculum"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form is not None:
            check_choice("form", self.form, FORMS)

    @property
    def outputs(self) -> tuple[str, ...]:  # type: ignore[override]
        return () if self.form == "pair" else ("log_sum_sq_probs",)

    def check(self, run: Run) -> None:
        if self.form == "pair" and run.trainer == "sft":
            raise ValueError("form='pair' is of preference pairs, but SFT trains sequences: leave form out.")
        if self.form == "sequence" and run.trainer == "reward":
            raise ValueError("form='sequence' reads the tokens' distributions, of which a reward model has none.")

    def score(self, batch: Batch) -> dict[str, Tensor]:
        values = self._distance(batch)
        return {self.last: values if batch.progress < self.window else torch.full_like(values, torch.nan)}

    def _distance(self, batch: Batch) -> Tensor:
        if isinstance(batch, PairBatch) and self.form != "sequence":
            return pair_el2n(batch.implicit_margin)
        expected = batch.policy.log_sum_sq_probs
        if expected is None:
            raise ValueError("'el2n' needs the sum of squared probabilities of each token, which this model lacks.")
        assert isinstance(batch, PairBatch | SequenceBatch)
        width = batch.token_mask.shape[1]
        tokens = token_el2n(batch.policy.log_probs[:, -width:], expected[:, -width:])
        if isinstance(batch, PairBatch):
            return token_mean(tokens, batch.token_mask).chunk(2)[0]
        return torch.where(batch.lengths > 0, batch.example_weights(tokens), torch.nan)

    def weigh(self, batch: Batch) -> Tensor:
        return torch.sigmoid(self.score(batch)[self.last] / self.temperature)
