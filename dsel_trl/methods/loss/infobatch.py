"""InfoBatch: fewer steps with the same expected gradient."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ...bases.scored import known_scores
from ...core.charges import Charge
from ...core.method import Method, Run, Step
from ...core.parameters import check_range, check_refresh, check_whole
from ...core.registry import register
from ...functional.loss.infobatch import infobatch_epoch, is_pruned_epoch
from ...signals.batch import Batch, Signal


@register("infobatch")
@dataclass
class InfoBatch(Method):
    """
    Leaves out a random part of the well-learned examples and weighs the rest of them up.

    What: of the examples whose last loss is below the mean, only the random share `keep_learned` (of them, not of all,
    so it is not called `keep`) stays, with the weight `1 / keep_learned`, so that the expected gradient is that of all
    data (hf.co/papers/2303.04947). After `delta` of the training, at the border of the pass that comes nearest,
    everything is used, with weight 1. The loss is that
    of the normal training forward: mean per token for SFT, per pair for DPO.
    Schedule: it is decided at the start of each pass, or, with a number in `refresh`, every so many optimizer steps
    over the examples that come next, by the losses known then (an adaptation for runs of few epochs); each example is
    decided on once per pass, so the expectation stays exact. `prescore` measures all losses before training, so that
    the first pass prunes too (an adaptation).
    Steps: the length of an epoch is fixed when training starts, from the share expected to be below the mean (a half);
    a pass goes on in the next epoch where it does not end with one.
    When: many epochs. When not: without `prescore` the first pass prunes nothing, so up to 2 epochs there is little to
    gain.
    Lag: a pass is planned while the last batches of the one before are still in flight.
    Plan of 1,000,000 examples: 0.2 s and 49 MB.
    """

    keep_learned: float = field(
        default=0.5, metadata={"help": "share of the well-learned examples to keep, in (0, 1]"}
    )
    delta: float = field(default=0.875, metadata={"help": "share of the training that prunes; the rest uses all data"})
    refresh: int | str = field(
        default="epoch", metadata={"help": 'when to decide: "epoch" (each pass), or every so many optimizer steps'}
    )
    prescore: bool = field(default=False, metadata={"help": "measure all losses once before training"})
    exact_weight: bool = field(default=False, metadata={"help": "weights |low| / |kept|: no bias from rounding"})
    min_keep: int = field(default=1, metadata={"help": "well-learned examples that are always kept"})

    signals = (Signal.LOSS,)
    trainers = ("dpo", "sft", "kto")
    paper = "hf.co/papers/2303.04947"
    selector = "random among the well learned, with weights"
    packed_rows = True
    carry_over = True
    normalize = "none"
    renamed: ClassVar[dict[str, str]] = {"prune_ratio": "keep_learned (1 - prune_ratio)", "period": "refresh"}
    charges = (Charge("forwards", when="prescore", reference=True),)
    cost = "no extra forward"
    state = "the loss column and 10 bytes per example; with steps in refresh 8 more"

    def __post_init__(self) -> None:
        check_range("keep_learned", self.keep_learned, 0, 1, open_low=True)
        check_range("delta", self.delta, 0, 1)
        check_whole("min_keep", self.min_keep, 0)
        check_refresh(self.refresh, ("epoch", "steps"))
        self._weights = np.empty(0, dtype=np.float32)
        self._next = np.empty(0, dtype=np.float32)
        self._in_flight = np.empty(0, dtype=bool)
        self._left_out = np.empty(0, dtype=bool)
        self._undecided = np.empty(0, dtype=np.int64)
        self._planned: tuple[tuple[int, int], np.ndarray] | None = None

    def setup(self, run: Run) -> None:
        self._weights = np.ones(run.size, dtype=np.float32)
        self._next = np.full(run.size, np.nan, dtype=np.float32)
        self._in_flight = np.zeros(run.size, dtype=bool)
        self._left_out = np.zeros(run.size, dtype=bool)
        if self.prescore and not run.resumed:
            losses = run.passes.measure(lambda batch: batch.loss, description="Losses before training")
            run.ledger.write("loss", None, losses, step=0)

    def epoch_size(self, run: Run) -> int:
        passes = max(1, int(np.ceil(run.epochs)))
        first = 0 if self.prescore else 1
        if isinstance(self.refresh, str):
            pruned: float = sum(is_pruned_epoch(epoch, passes, self.delta) for epoch in range(first, passes))
        else:
            pruned = max(0.0, self.delta * passes - first)
        return max(1, round(run.size * (passes - 0.5 * (1 - self.keep_learned) * pruned) / passes))

    def due(self, run: Run) -> bool:
        # Each plan is served to its end, and then comes the next: none is broken off.
        return False

    def plan(self, run: Run, epoch: int) -> np.ndarray:
        plan = (run.epoch, run.plans_made)
        if self._planned is None or self._planned[0] != plan:
            self._planned = plan, self._decide(run)
        return self._planned[1]

    def _decide(self, run: Run) -> np.ndarray:
        """Ids of the plan being made: once for each, as those it keeps are on their way from then on."""
        rng = run.plan_rng("infobatch/prune")
        asked = self._asked(run, rng)
        pruning = run.progress < self.delta
        if isinstance(self.refresh, str):
            # Passes may be shorter than epochs: it is the training that is measured, not the number of passes.
            pruning = pruning and is_pruned_epoch(round(run.progress * run.epochs), run.epochs, self.delta)
        ids, weights = infobatch_epoch(
            known_scores(run, "loss"),
            rng,
            pruned=pruning and self.keep_learned < 1,
            prune_ratio=1 - self.keep_learned,
            exact_weight=self.exact_weight,
            min_keep=self.min_keep,
            candidates=asked,
        )
        self._left_out[asked] = True
        self._left_out[ids] = False
        run.ledger.drop(self._left_out, self.name)
        rule = "the well-learned (a loss below the mean) are left out at random"
        run.ledger.decide(self.name, asked, known_scores(run, "loss")[asked], run.step, rule)
        # Examples of the last plan that are still on their way to the trainer keep its weight until they are trained.
        again = ids[self._in_flight[ids]]
        fresh = ids[~self._in_flight[ids]]
        self._next[again] = weights[again]
        self._weights[fresh] = weights[fresh]
        self._in_flight[ids] = True
        return ids

    def _asked(self, run: Run, rng: np.random.Generator) -> np.ndarray:
        """The examples to decide on now: all, or the next `refresh` steps' worth of a pass in random order."""
        if isinstance(self.refresh, str):
            return np.arange(run.size)
        if not len(self._undecided):
            self._undecided = rng.permutation(run.size)
        assert isinstance(self.refresh, int)
        arguments = run.arguments
        step = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * run.world
        asked, self._undecided = np.split(self._undecided, [self.refresh * step])
        return asked

    def weigh(self, batch: Batch) -> Tensor:
        return torch.from_numpy(self._weights[batch.ids.cpu().numpy()]).to(batch.ids.device)

    def observe(self, run: Run, step: Step) -> None:
        waiting = step.ids[~np.isnan(self._next[step.ids])]
        self._weights[waiting] = self._next[waiting]
        self._next[waiting] = np.nan
        self._in_flight[np.setdiff1d(step.ids, waiting)] = False

    def state_dict(self) -> dict[str, Any]:
        return {
            "weights": self._weights,
            "next": self._next,
            "in_flight": self._in_flight,
            "left_out": self._left_out,
            "undecided": self._undecided,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._weights, self._next = state["weights"].copy(), state["next"].copy()
        self._in_flight, self._left_out = state["in_flight"].astype(bool), state["left_out"].astype(bool)
        self._undecided = state["undecided"].astype(np.int64)
