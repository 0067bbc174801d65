"""Per-example weights from the dataset."""

from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from ...core.method import Method, Run, Step
from ...core.parameters import check_choice
from ...core.registry import register
from ...signals.batch import Batch


@register("weight_column")
@dataclass
class WeightColumn(Method):
    """
    Weighs each example by a dataset column.

    What: the gradient of each pair or conversation is multiplied by its value; 0 drops it. With `normalize: mean1` the
    weights are divided by their mean over the optimizer step, so that the learning rate keeps its meaning. A missing
    value (NaN, null) counts as 0; in a stream, whose values are known only as they come, it is an error, and so is a
    first step of zeros.
    When not: a negative weight trains against an example; it is refused unless `allow_negative` says that it is meant.
    """

    column: str = field(default="weight", metadata={"help": "name of the numeric dataset column"})
    normalize: str = field(default="mean1", metadata={"help": '"mean1": weights average 1 over each step; "none"'})
    allow_negative: bool = field(default=False, metadata={"help": "whether negative weights are meant"})

    trainers = ("dpo", "sft", "kto", "reward")
    criterion = "external_continuous"
    selector = "weight"
    state = "none"

    def __post_init__(self) -> None:
        check_choice("normalize", self.normalize, ("mean1", "none"))
        if self.allow_negative and self.normalize == "mean1":
            raise ValueError("allow_negative=True goes with normalize='none': a mean near zero cannot be divided by.")
        self._streaming = False

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,)

    def check(self, run: Run) -> None:
        self._streaming = run.streaming
        if run.streaming:
            return  # the values of a stream are checked as they come
        values = run.column(self.column)
        negative = np.flatnonzero(values < 0)
        if len(negative) and not self.allow_negative:
            raise ValueError(
                f"Column {self.column!r} has {len(negative)} negative weights, the first {values[negative[0]]} at row "
                f"{negative[0]}. Set allow_negative=True (with normalize='none') if training against them is meant."
            )
        if not np.any(np.nan_to_num(values, posinf=0.0, neginf=0.0)):
            raise ValueError(f"Column {self.column!r} is zero everywhere: nothing would be trained.")

    def weigh(self, batch: Batch) -> Tensor:
        weights = batch.column(self.column)
        if self._streaming:
            self._check(weights)
        return weights if self.allow_negative else weights.clamp(min=0)

    def _check(self, weights: Tensor) -> None:
        """What `check` says of a whole column, of one batch of a stream."""
        values = weights.detach().float().cpu().numpy()
        if len(unknown := values[~np.isfinite(values)]):
            raise ValueError(
                f"Column {self.column!r} of the stream holds {unknown[0]} (null, or no finite number), but every "
                "example needs a weight: fill it, or filter such rows out."
            )
        if not self.allow_negative and len(negative := values[values < 0]):
            raise ValueError(
                f"Column {self.column!r} of the stream holds the negative weight {negative[0]:g}. Set "
                "allow_negative=True (with normalize='none') if training against an example is meant."
            )

    def observe(self, run: Run, step: Step) -> None:
        if self._streaming and run.step == 1 and not np.any(step.values["weight"]):
            raise ValueError(
                f"Column {self.column!r} of the stream is 0 in all {len(step.ids)} examples of the first step: "
                "nothing was trained. Filter such rows out, or give another column."
            )
