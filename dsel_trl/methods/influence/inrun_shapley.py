"""In-run data Shapley: what each example has contributed to a target's loss in this very run."""

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ...bases.influence import FollowsGradient, length
from ...bases.scored import ByScore
from ...core.charges import Charge
from ...core.ledger import Ledger
from ...core.method import Run
from ...core.parameters import Reads, check_choice, check_whole, when
from ...core.registry import register
from ...core.run import Step
from ...functional.influence.inrun_shapley import inrun_shapley
from ...signals.batch import Batch, Signal
from ...signals.ghost import Direction, ExampleGradients, GradientRequest

SCALES = ("rate", "plain", "cosine")


@register("inrun_shapley")
@dataclass
class InRunShapley(FollowsGradient, ByScore):
    """
    Keeps the examples whose gradients have lowered the loss of a target in this run, by their Shapley values.

    What: in each step an example's value is its Shapley share of the change of the target's mean loss, by a Taylor
    model of the step: the learning rate times the product of its gradient with the target's (`taylor: 1`), less what
    the examples of the step take from each other (`taylor: 2`). Values are added up over the run (positive = helpful);
    `action` says what to do about them. The products are exact and come out of the ordinary backward pass.
    A weight that another method gives is taken out again; an example of weight 0 has no value in that step.
    When: a small clean target is at hand and the training set is mixed or partly mislabelled. To find flipped labels,
    rather than to share out what a run has gained, `scale: cosine` is better: the value counts a step by its learning
    rate (`benchmarks/flips.py`, 640 pairs with 30% flips, five seeds: AUROC 0.75 by the value, 0.79 by the cosine,
    0.84 by the cosine over `layers: norms`; 0.77 by backward passes of all parameters, 0.80 by the implicit margin
    alone).
    When not: as a judgement of one example after one visit, which is noisy; under an optimizer far from SGD, for which
    the value stands in for its own (`precondition: adam` is nearer).
    Memory: the target's gradient in float32 (that of the layers' parameters; in a checkpoint too where
    `target_refresh` > 1); `taylor: 2` holds the layers' inputs and output gradients of a step, and a copy of the
    parameters. Time between two gradients of the target: 1.3 times a step over all linear layers (DPO of 135 million
    parameters in bf16 on an H100); with LoRA there, where a step is the launching of small kernels, 1.6 times; on a
    CPU core (`benchmarks/influence.py`) 1.16 and 1.05 times, and 1.02 and 1.01 times the peak memory. A gradient of a
    target of 8 takes a step. Plan lag: as for every live score.
    """

    taylor: int = field(
        default=1, metadata={"help": "order of the Taylor model of a step, 1 or 2; 2 makes two more passes per step"}
    )
    scale: str = field(
        default="rate",
        metadata={
            "help": "what a step's product counts: rate, what the step has made of it (the Shapley value); plain, the "
            "product, every step alike; cosine, that of gradients of length 1"
        },
    )
    accumulate: str = field(default="sum", metadata={"help": "sum: the value in the run; mean: that per visit"})

    signals = (Signal.INFLUENCE,)
    paper = "hf.co/papers/2406.11011"
    family = "reduction"
    criterion = "external_continuous"
    selector = "top_k, band, weight, sample, curriculum"
    charges = (
        Charge("gradients", per="target example and refresh", reference=True),
        Charge("gradients", amount="2", per="target example and step", when="taylor: 2", reference=True),
    )
    state = "its score and two or three further columns, and the target's gradient between two refreshes"
    reads: ClassVar[Reads] = {"precondition": (when("taylor", 1),), "scale": (when("taylor", 1),)}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("taylor", self.taylor, 1, 2)
        check_choice("scale", self.scale, SCALES)
        check_choice("accumulate", self.accumulate, ("sum", "mean"))
        self._bent: Direction = {}
        self._bent_at = -1
        # Norm of the target's gradient, and of which one it is.
        self._measured: Direction = {}
        self._length = 0.0
        self._ledger = Ledger(0)
        # Root mean square of all values, which weights are made by; `None` = not known since the last step.
        self._scale: float | None = None

    def setup(self, run: Run) -> None:
        run.ledger.add(self.name)
        self._ledger = run.ledger

    def gradients(self, run: Run) -> GradientRequest | None:
        direction = self.direction(run)
        if direction is None:
            return None
        cosine = self.scale == "cosine"
        if cosine and direction is not self._measured:
            self._measured, self._length = direction, length(direction)
        return GradientRequest(self.layers, directions={"target": direction}, keep=self.taylor == 2, norms=cosine)

    def after_backward(self, run: Run, batch: Batch, gradients: ExampleGradients) -> dict[str, Tensor]:
        products = gradients.dot("target")
        if self.scale == "rate":
            products = gradients.shares * products
        elif self.scale == "cosine":
            # A gradient of length 0 points nowhere: its cosine is 0.
            lengths = gradients.norms * self._length
            products = torch.where(lengths == 0, 0.0, products / lengths)
        values = {f"{self.name}_product": products}
        if self.taylor == 2:
            values[f"{self.name}_curved"] = gradients.shares * gradients.against(self._bent_target(run))
        return values

    def _bent_target(self, run: Run) -> Direction:
        """What the step's gradient changes of the target's, once per step: Hessian of its loss times that gradient."""
        if self._bent_at != run.step:
            of_step = run.gradients.of_step(self.layers)
            self._bent = run.gradients.curvature(of_step, lambda: self.target_gradient(run))
            self._bent_at = run.step
        return self._bent

    def observe(self, run: Run, step: Step) -> None:
        products = step.values.get(f"{self.name}_product")
        if products is None or step.skipped:
            return
        rate = step.learning_rate * step.clip_factor if self.scale == "rate" else 1.0
        curved = step.values.get(f"{self.name}_curved")
        bent = None if curved is None else torch.from_numpy(curved) * rate
        values = -inrun_shapley(torch.from_numpy(products), rate, bent).numpy()
        known = np.isfinite(values)
        self._add(run, step.ids[known], values[known])

    def _add(self, run: Run, ids: np.ndarray, values: np.ndarray) -> None:
        """Adds values to the examples' totals; an example may come several times."""
        times = f"{self.name}_times"
        for name in (self.name, times):
            run.ledger.add(name)
        unique, place = np.unique(ids, return_inverse=True)
        rows = run.ledger.rows(unique)
        before = np.nan_to_num(run.ledger[times][rows])
        total = np.nan_to_num(run.ledger[self.name][rows]).astype(np.float64)
        if self.accumulate == "mean":
            total *= before
        np.add.at(total, place, values)
        count = before + np.bincount(place, minlength=len(unique))
        run.ledger.write(times, unique, count, run.step)
        run.ledger.write(self.name, unique, total / count if self.accumulate == "mean" else total, run.step)
        self._scale = None

    def weigh(self, batch: Batch) -> Tensor:
        """`sigmoid(value / (temperature * root mean square of all values))`; 0.5 for what has no value yet."""
        if self._scale is None:
            known = self._ledger[self.name]
            known = known[np.isfinite(known)].astype(np.float64)
            self._scale = float(np.sqrt(np.mean(known**2))) if len(known) else 0.0
        values = np.nan_to_num(self._ledger[self.name][self._ledger.rows(batch.ids.cpu().numpy())])
        scores = torch.from_numpy(values).to(batch.ids.device) / (self._scale or 1.0)
        return torch.sigmoid(scores / self.temperature)
