"""A beta for each batch, and its unusual pairs left out."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...core.method import Method, Run
from ...core.parameters import check_choice, check_range
from ...core.registry import register
from ...functional.preference.beta_dpo import (
    batch_beta,
    draw_mask,
    kept_mean_weights,
    kept_pairs,
    log_keep_weights,
)
from ...functional.running import EmaMoments, ema_update
from ...signals.batch import Batch, Signal
from ...signals.pair_batch import PairBatch


@register("beta_dpo")
@dataclass
class BetaDpo(Method):
    """
    Scales beta by the margins of each batch and leaves out the pairs whose margin is unusual.

    What: moving averages M and S of the mean and deviation of the batch's log-ratio margins h; the share
    `keep` of it is drawn with the weights `exp(-((h - M) / S)^2 / 2)`; the rest is trained with
    `beta = max(beta0 * (1 + a * (mean of the kept h - M)), floor)` (hf.co/papers/2407.08639). All statistics are those
    of one micro-batch over all processes; acts at once. TRL's `beta` is beta0, and is beta0 again after each loss.
    Works with every loss type that has a beta and treats pairs one by one; TRL's logged rewards are those with the
    beta of their batch.
    When: data of mixed quality, micro-batches of 8 pairs or more.
    When not: h is a sum over tokens, so for long responses `a` must be small, or beta swings between its extremes. A
    micro-batch of one pair is trained as it is.
    """

    a: float = field(default=0.6, metadata={"help": "how far beta follows the margins; 0 keeps it constant"})
    keep: float = field(default=0.8, metadata={"help": "share of each micro-batch to keep, in (0, 1]"})
    decay: float = field(default=0.9, metadata={"help": "share of the old value in the moving averages, in [0, 1)"})
    floor: float = field(default=1e-3, metadata={"help": "smallest beta"})
    ema_init: str = field(
        default="first_batch", metadata={"help": '"first_batch", or "zero" as in the authors\' code (peaked at first)'}
    )

    signals = (Signal.POLICY_LOGPS, Signal.REF_LOGPS)
    trainers = ("dpo",)
    couples = True
    paper = "hf.co/papers/2407.08639"
    selector = "random by weight, in the batch"
    own_loss = True
    normalize = "none"
    renamed: ClassVar[dict[str, str]] = {"filter_ratio": "keep (1 - filter_ratio)"}
    state = "two moving averages and two counters"

    def __post_init__(self) -> None:
        check_range("a", self.a, 0, float("inf"), open_high=True)
        check_range("keep", self.keep, 0, 1, open_low=True)
        check_range("decay", self.decay, 0, 1, open_high=True)
        check_range("floor", self.floor, 0, float("inf"), open_low=True, open_high=True)
        check_choice("ema_init", self.ema_init, ("first_batch", "zero"))
        self._moments = EmaMoments()
        self._batches = 0
        self._weights: Tensor | None = None

    def adjust(self, run: Run, batch: Batch) -> dict[str, float]:
        assert isinstance(batch, PairBatch)
        margins, own = batch.gather(batch.log_ratio_margin)
        self._moments = ema_update(self._moments, margins, self.decay, self.ema_init)
        self._batches += 1
        beta = batch.settings.beta
        if len(margins) < 2 or not self._moments.std > 0:
            self._weights = None
            return {"beta": beta}
        # Drawn on the CPU from a seed of the run's own: the same on every process and after a resume.
        generator = torch.Generator().manual_seed(run.stream_seed("beta_dpo/mask", self._batches))
        log_weights = log_keep_weights(margins, self._moments.mean, self._moments.std)
        mask = draw_mask(log_weights, kept_pairs(len(margins), 1 - self.keep), generator)
        self._weights = kept_mean_weights(mask)[own]
        used = batch_beta(margins, mask, self._moments.mean, self._moments.std, beta, self.a, self.floor)
        run.log({"beta_dpo_beta": used, "beta_dpo_mean": self._moments.mean, "beta_dpo_std": self._moments.std})
        return {"beta": used}

    def score(self, batch: Batch) -> Tensor:
        """Logarithm of the keep-weight: how usual the pair's margin is."""
        assert isinstance(batch, PairBatch)
        return log_keep_weights(batch.log_ratio_margin, self._moments.mean, self._moments.std)

    def weigh(self, batch: Batch) -> Tensor | None:
        return self._weights

    def state_dict(self) -> dict[str, Any]:
        moments = self._moments
        return {"mean": moments.mean, "std": moments.std, "updates": moments.updates, "batches": self._batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._moments = EmaMoments(state["mean"], state["std"], state["updates"])
        self._batches = state["batches"]
