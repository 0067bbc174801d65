"""A target margin per pair, larger where the policy is sure, with a fixed mean."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...bases.replaced_loss import Averages, LossForm
from ...core.method import Run
from ...core.parameters import Reads, check_choice, check_range, when
from ...core.registry import register
from ...functional.margins import simpo_margin
from ...functional.preference.gamma_po import (
    QUEUE_LENGTH,
    SET_SIZE,
    GapQueue,
    gamma_po_gate_rows,
    gamma_po_gate_weight,
    queue_draw,
    queue_push,
    target_margins,
)
from ...signals.batch import Batch, Signal
from ...signals.pair_batch import PairBatch


@register("gamma_po")
@dataclass
class GammaPo(LossForm):
    """
    Gives confident pairs a larger target margin and ambiguous ones a smaller one; the mean stays as it is.

    What: target margins `gamma_i = gamma0 * n * p_i`, where p minimises the mean loss plus `tau * KL(p || uniform)`
    over the batch of all processes and up to 256 gaps of earlier batches (github.com/sunjie279/gammaPO). `form: simpo`
    is `softplus(-(g - gamma))` with `g = beta * (alp_w - alp_l)`; `form: dpo` is `softplus(-(g - (gamma - gamma0)))`
    with TRL's own margin and beta. Both exact, as weights on TRL's sigmoid loss.
    When: ambiguous or noisy labels. When not: other loss types than sigmoid are refused.
    """

    form: str = field(default="simpo", metadata={"help": '"simpo" (averages, own beta) or "dpo" (the trainer\'s)'})
    beta: float = field(default=2.5, metadata={"help": "simpo: scale of the averaged margin; 2.5 to 10"})
    gamma_ratio: float = field(default=0.4, metadata={"help": "mean target margin divided by beta; 0.15 to 0.5"})
    tau: float = field(default=10.0, metadata={"help": "the larger, the nearer to one common margin; 3 to 20"})

    signals = (Signal.POLICY_LOGPS, Signal.REF_LOGPS)
    reads: ClassVar[Reads] = {
        "beta": (when("form", "simpo"),),
    }
    couples = True
    paper = "github.com/sunjie279/gammaPO (ACL 2025)"
    state = f"the last {QUEUE_LENGTH} gaps"

    def __post_init__(self) -> None:
        check_choice("form", self.form, ("simpo", "dpo"))
        check_range("beta", self.beta, 0, float("inf"), open_low=True)
        check_range("gamma_ratio", self.gamma_ratio, 0, float("inf"))
        check_range("tau", self.tau, 0, float("inf"), open_low=True)
        self._queue = GapQueue()
        self._batches = 0
        self._run: Run | None = None

    def setup(self, run: Run) -> None:
        self._run = run

    def weigh(self, batch: Batch) -> Tensor:
        assert isinstance(batch, PairBatch)
        assert self._run is not None
        dpo = self.form == "dpo"
        beta = batch.settings.beta if dpo else self.beta
        averages = Averages.of(batch)
        gaps = batch.implicit_margin if dpo else simpo_margin(averages.policy_chosen, averages.policy_rejected, beta)
        together, own = batch.gather(gaps)
        self._batches += 1
        past = queue_draw(self._queue, len(together), self._run.rng("gamma_po/past", self._batches), SET_SIZE)
        gamma0 = self.gamma_ratio * beta
        margins = target_margins(together, gamma0, self.tau, torch.from_numpy(past))[own]
        self._queue = queue_push(self._queue, together.cpu().numpy())
        if dpo:
            return gamma_po_gate_weight(gaps, margins, gamma0)
        return gamma_po_gate_rows(gaps, margins, beta, **self.stock(batch))

    def state_dict(self) -> dict[str, Any]:
        return {"gaps": self._queue.gaps, "batches": self._batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._queue, self._batches = GapQueue(state["gaps"].copy()), state["batches"]
