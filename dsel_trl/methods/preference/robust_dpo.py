"""Weights for preference labels of which some are flipped."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ...bases.replaced_loss import check_sigmoid
from ...core.method import Method, Run, Step
from ...core.parameters import Reads, check_choice, check_range, when
from ...core.registry import register
from ...functional.preference.robust_dpo import (
    clean_posterior,
    conservative_gate_weight,
    estimate_flip_rate,
    robust_gate_weight,
)
from ...signals.batch import Batch, Signal
from ...signals.pair_batch import PairBatch


@register("robust_dpo")
@dataclass
class RobustDpo(Method):
    """
    Corrects for label noise: each pair's label counts as flipped with probability `eps`.

    What: `mode: posterior` weighs each pair by the probability that its label is right, given its reward margin
    (after `warmup` of the steps; with `estimate`, eps follows the weights once an epoch). `mode: rdpo` and
    `mode: cdpo` give the gradients of robust DPO (hf.co/papers/2403.00409) and of label smoothing as weights on the
    sigmoid loss, exactly.
    When: noisy human labels. When not: `rdpo` keeps pushing margins of any size apart; for that loss without anything
    else, TRL's own `loss_type: robust` does the same.
    """

    eps: float = field(default=0.1, metadata={"help": "flip probability, in [0, 0.5)"})
    mode: str = field(default="posterior", metadata={"help": '"posterior", "rdpo" or "cdpo"'})
    warmup: float = field(default=0.1, metadata={"help": "posterior: share of the steps before weighting begins"})
    estimate: bool = field(default=False, metadata={"help": "posterior: estimate eps anew after each epoch"})
    normalize: str = field(default="none", metadata={"help": '"none": weights as they are; "mean1"'})

    signals = (Signal.IMPLICIT_MARGIN,)
    trainers = ("dpo", "reward")
    paper = "hf.co/papers/2403.00409"
    reads: ClassVar[Reads] = {
        "warmup": (when("mode", "posterior"),),
        "estimate": (when("mode", "posterior"),),
    }
    selector = "weight"
    state = "eps and two sums"

    def __post_init__(self) -> None:
        check_range("eps", self.eps, 0, 0.5, open_high=True)
        check_choice("mode", self.mode, ("posterior", "rdpo", "cdpo"))
        check_range("warmup", self.warmup, 0, 1)
        check_choice("normalize", self.normalize, ("none", "mean1"))
        self.own_loss = self.mode != "posterior"
        self._eps = self.eps
        self._posteriors: list[np.ndarray] = []
        self._epoch = 0

    def check(self, run: Run) -> None:
        if self.own_loss and run.trainer != "dpo":
            raise ValueError(f"mode={self.mode!r} is a form of DPO's loss: with a reward model use mode='posterior'.")
        if self.own_loss:
            check_sigmoid(run, f"mode={self.mode!r}")

    def score(self, batch: Batch) -> Tensor:
        assert isinstance(batch, PairBatch)
        return clean_posterior(batch.implicit_margin, self._eps)

    def weigh(self, batch: Batch) -> Tensor | None:
        assert isinstance(batch, PairBatch)
        if self.mode == "rdpo":
            return robust_gate_weight(batch.implicit_margin, self._eps)
        if self.mode == "cdpo":
            return conservative_gate_weight(batch.implicit_margin, self._eps)
        return self.score(batch) if batch.progress >= self.warmup else None

    def observe(self, run: Run, step: Step) -> None:
        if not self.estimate:
            return
        if run.epoch > self._epoch and self._posteriors:
            posteriors = np.concatenate(self._posteriors)
            self._eps = estimate_flip_rate(torch.from_numpy(posteriors))
            self._posteriors, self._epoch = [], run.epoch
        self._posteriors.append(step.values[self.name])
        run.log({"robust_dpo_eps": self._eps})

    def state_dict(self) -> dict[str, Any]:
        posteriors = np.concatenate(self._posteriors) if self._posteriors else np.empty(0, dtype=np.float32)
        return {"eps": self._eps, "epoch": self._epoch, "posteriors": posteriors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._eps, self._epoch = state["eps"], state["epoch"]
        self._posteriors = [state["posteriors"]] if len(state["posteriors"]) else []
