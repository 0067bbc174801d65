"""Pairs weighed by judged quality and by what the policy still lacks."""

from dataclasses import dataclass, field

from torch import Tensor

from ...bases.explicit_margin import ExplicitMargin
from ...bases.replaced_loss import Averages, LossForm
from ...core.parameters import check_range
from ...core.registry import register
from ...functional.preference.uni_dpo import performance_weight, quality_weight, uni_dpo_gate_rows
from ...signals.batch import Batch, Signal
from ...signals.pair_batch import PairBatch


@register("uni_dpo")
@dataclass
class UniDpo(ExplicitMargin, LossForm):
    """
    Weighs pairs by how clearly they are judged and by how far the policy is from separating them.

    What: `w_q * w_p * softplus(-beta * margin) - lambda * [chosen has become less likely, and is good] * logp(chosen)`
    with `w_q = sigmoid(eta * (s_w - s_l))`, `w_p = (1 - sigmoid(beta * (alp_w - alp_l) - tau_ref))^gamma` and
    per-token averages throughout (hf.co/papers/2506.10054), exactly, as row weights on TRL's sigmoid loss. The scores
    come from columns, `reward` or `reward_model`; a pair without them gets w_q = 0.5. The ledger holds w_q * w_p.
    When: judged data on a known scale; `tau_good` and `nll_weight` are on the judge's scale (3.2 of 5 in the paper).
    When not: other loss types than sigmoid are refused. The learning rate that suits TRL's beta of 0.1 need not suit a
    loss of per-token averages, whose gradient is smaller by about the length of a response.
    """

    beta: float = field(default=2.0, metadata={"help": "scale of the averaged margins; 2 to 10 in the paper"})
    eta: float = field(default=0.7, metadata={"help": "scale of the judged gap in w_q"})
    tau_ref: float = field(default=0.8, metadata={"help": "margin at which a pair counts as half learned"})
    gamma: float = field(default=3.0, metadata={"help": "sharpness of w_p; 0 switches it off"})
    nll_weight: float = field(default=0.001, metadata={"help": "lambda of the likelihood term; 0.2 for mathematics"})
    tau_good: float = field(default=3.2, metadata={"help": "score from which a chosen response deserves that term"})
    detach_weight: bool = field(
        default=False,
        metadata={"help": "w_p as a constant (pure weighting) instead of carrying gradient (authors' code)"},
    )

    signals = (Signal.POLICY_LOGPS, Signal.REF_LOGPS, Signal.EXPLICIT_MARGIN)
    paper = "hf.co/papers/2506.10054"
    criterion = "external_discrete and internal"

    def __post_init__(self) -> None:
        check_range("beta", self.beta, 0, float("inf"), open_low=True)
        check_range("gamma", self.gamma, 0, float("inf"))
        check_range("nll_weight", self.nll_weight, 0, float("inf"))
        self.check_reward()

    def score(self, batch: Batch) -> Tensor:
        assert isinstance(batch, PairBatch)
        chosen, rejected, *_ = Averages.of(batch)
        performance = performance_weight(chosen, rejected, self.beta, self.tau_ref, self.gamma)
        return quality_weight(*self.batch_scores(batch), self.eta) * performance

    def weigh(self, batch: Batch) -> Tensor:
        assert isinstance(batch, PairBatch)
        return uni_dpo_gate_rows(
            *Averages.of(batch),
            *self.batch_scores(batch),
            **self.stock(batch),
            beta=self.beta,
            eta=self.eta,
            tau_ref=self.tau_ref,
            gamma=self.gamma,
            nll_lambda=self.nll_weight,
            tau_good=self.tau_good,
            detach_weight=self.detach_weight,
        )
