"""InfoBatch: fewer steps with the same expected gradient."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..functional.infobatch import infobatch_prune, is_pruned_epoch
from ..method import Method, Run, Step, check_range, register
from ..selection import known_scores
from ..tap import Batch, Signal


@register("infobatch")
@dataclass
class InfoBatch(Method):
    """
    Leaves out a random part of the well-learned examples and weighs the rest of them up.

    What: at the start of each pass, of the examples whose last loss is below the mean a share `prune_ratio` is dropped
    at random; the survivors get the weight `1 / (1 - prune_ratio)`, so that the expected gradient is that of all data
    (hf.co/papers/2303.04947). The last passes use everything with weight 1. The loss is that of the normal training
    forward: mean per token for SFT, per pair for DPO.
    Steps: the length of an epoch is fixed when training starts, from the share expected to be below the mean (a half);
    a pass goes on in the next epoch where it does not end with one.
    When: many epochs. When not: the first pass prunes nothing, so up to 2 epochs there is little to gain.
    Lag: a pass is planned while the last batches of the one before are still in flight.
    """

    prune_ratio: float = field(default=0.5, metadata={"help": "share of the well-learned examples to drop, in [0, 1)"})
    delta: float = field(default=0.875, metadata={"help": "share of the passes that prune; the rest use all data"})
    exact_weight: bool = field(default=False, metadata={"help": "weights |low| / |kept|: no bias from rounding"})
    min_keep: int = field(default=1, metadata={"help": "well-learned examples that are always kept"})

    signals = (Signal.LOSS,)
    paper = "hf.co/papers/2303.04947"
    selector = "random among the well learned, with weights"
    packed_rows = True
    carry_over = True
    normalize = "none"
    state = "the loss column and 9 bytes per example"

    def __post_init__(self) -> None:
        check_range("prune_ratio", self.prune_ratio, 0, 1, open_high=True)
        check_range("delta", self.delta, 0, 1)
        check_range("min_keep", self.min_keep, 0, 2**31)
        self._weights = np.empty(0, dtype=np.float32)
        self._next = np.empty(0, dtype=np.float32)
        self._in_flight = np.empty(0, dtype=bool)

    def setup(self, run: Run) -> None:
        self._weights = np.ones(run.size, dtype=np.float32)
        self._next = np.full(run.size, np.nan, dtype=np.float32)
        self._in_flight = np.zeros(run.size, dtype=bool)

    def epoch_size(self, run: Run) -> int:
        passes = max(1, int(np.ceil(run.epochs)))
        pruned = sum(is_pruned_epoch(epoch, passes, self.delta) for epoch in range(1, passes))
        return max(1, round(run.size * (passes - 0.5 * self.prune_ratio * pruned) / passes))

    def plan(self, run: Run, epoch: int) -> np.ndarray:
        rng = run.plan_rng()
        prune = is_pruned_epoch(run.plans_made, run.epochs, self.delta) and run.progress < self.delta
        if prune and self.prune_ratio > 0:
            ids, weights = infobatch_prune(
                known_scores(run, "loss"),
                rng,
                prune_ratio=self.prune_ratio,
                exact_weight=self.exact_weight,
                min_keep=self.min_keep,
            )
            run.ledger.drop(~np.isin(np.arange(run.size), ids), self.name)
        else:
            ids, weights = rng.permutation(run.size), np.ones(run.size, dtype=np.float32)
            run.ledger.drop(np.zeros(run.size, dtype=bool), self.name)
        # Examples of the last pass that are still on their way to the trainer keep its weight until they are trained.
        self._next = np.where(self._in_flight, weights, np.nan).astype(np.float32)
        self._weights = np.where(self._in_flight, self._weights, weights).astype(np.float32)
        self._in_flight[ids] = True
        return ids

    def weigh(self, batch: Batch) -> Tensor:
        return torch.from_numpy(self._weights[batch.ids.cpu().numpy()]).to(batch.ids.device)

    def observe(self, run: Run, step: Step) -> None:
        waiting = step.ids[~np.isnan(self._next[step.ids])]
        self._weights[waiting] = self._next[waiting]
        self._next[waiting] = np.nan
        arrived = np.setdiff1d(step.ids, waiting)
        self._in_flight[arrived] = False

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self._weights, "next": self._next, "in_flight": self._in_flight}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._weights, self._next = state["weights"].copy(), state["next"].copy()
        self._in_flight = state["in_flight"].astype(bool)
