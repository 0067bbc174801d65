"""Weights from the dataset: of examples, of turns, of parts or of tokens."""

import logging
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from ...core.method import Method, Run, Step
from ...core.parameters import check_choice
from ...core.registry import register
from ...data.columns import is_list_column
from ...data.token_values import PER, TokenValues, token_values
from ...signals.batch import Batch
from ...signals.sequence_batch import SequenceBatch


@register("weight_column")
@dataclass
class WeightColumn(Method):
    """
    Weighs each example by a dataset column.

    What: the gradient of each pair or conversation is multiplied by its value; 0 drops it. With `normalize: mean1` the
    weights are divided by their mean over the optimizer step, so that the learning rate keeps its meaning. A missing
    value (NaN, null) counts as 0, which is said once; in a stream, whose values are known only as they come, it is an
    error, and so is a first step of zeros. For SFT the column may hold lists: `per: turn` takes one weight for each
    assistant turn that is trained (each run of trained tokens), `per: token` one for each trained token, the end token
    included; a list is cut where its row was truncated, and one that does not fit its row is an error. `per: part`
    takes two weights, of the prompt and of the completion, where prompts are trained too (`completion_only_loss:
    false`).
    When not: a negative weight trains against an example; it is refused unless `allow_negative` says that it is meant.
    """

    column: str = field(
        default="weight", metadata={"help": "name of the dataset column of numbers, or of lists of them"}
    )
    per: str = field(
        default="example",
        metadata={"help": '"example": a number per row; "turn", "part", "token": a list per row (SFT)'},
    )
    normalize: str = field(default="mean1", metadata={"help": '"mean1": weights average 1 over each step; "none"'})
    allow_negative: bool = field(default=False, metadata={"help": "whether negative weights are meant"})

    trainers = ("dpo", "sft", "kto", "reward")
    criterion = "external_discrete"
    selector = "weight"
    state = "with lists, 4 bytes per trained token in memory"

    def __post_init__(self) -> None:
        check_choice("per", self.per, ("example", *PER))
        check_choice("normalize", self.normalize, ("mean1", "none"))
        if self.allow_negative and self.normalize == "mean1":
            raise ValueError("allow_negative=True goes with normalize='none': a mean near zero cannot be divided by.")
        self._streaming = False
        self._tokens: TokenValues | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,)

    @property
    def list_columns(self) -> tuple[str, ...]:
        return (self.column,)

    def check(self, run: Run) -> None:
        self._streaming = run.streaming
        if self.per != "example":
            self._check_lists(run)
            return
        if run.streaming:
            return  # the values of a stream are checked as they come
        if is_list_column(run.dataset, self.column):
            raise ValueError(
                f"Column {self.column!r} holds lists, but per='example' needs one weight a row. Set per='turn' for "
                "one weight per trained turn, per='part' for one of the prompt and one of the completion, or "
                "per='token' for one per trained token (SFT)."
            )
        values = run.column(self.column)
        if len(infinite := np.flatnonzero(np.isinf(values))):
            raise ValueError(
                f"Column {self.column!r} holds {values[infinite[0]]} at row {run.rows.positions[infinite[0]]}, but a "
                "weight is a finite number: 0 leaves an example out."
            )
        if missing := int(np.isnan(values).sum()):
            run.tell(
                f"{self.name}:missing",
                f"{self.name!r}: {missing} of {len(values)} rows have no value in column {self.column!r}; they count "
                "as 0, so nothing is learned from them.",
                logging.WARNING,
            )
        negative = np.flatnonzero(values < 0)
        if len(negative) and not self.allow_negative:
            raise ValueError(
                f"Column {self.column!r} has {len(negative)} negative weights, the first {values[negative[0]]} at row "
                f"{run.rows.positions[negative[0]]}. Set allow_negative=True (with normalize='none') if training "
                "against them is meant."
            )
        if not np.any(np.nan_to_num(values)):
            raise ValueError(f"Column {self.column!r} is zero everywhere: nothing would be trained.")

    def _check_lists(self, run: Run) -> None:
        """Reads the lists; what `check` says of numbers, of them."""
        if run.trainer != "sft":
            raise ValueError(
                f"per={self.per!r} weighs the terms of a sum over tokens, which the loss of trainer {run.trainer!r} "
                "is not: no loss would have that gradient. Set per='example'."
            )
        if run.streaming:
            raise ValueError(
                f"per={self.per!r} compares each list with the tokens of its row before training, which a stream does "
                "not allow. Load the dataset without streaming, or set per='example'."
            )
        self._tokens = token_values(run.rows, self.column, self.per)
        values, offsets = self._tokens.values, self._tokens.offsets
        negative = np.flatnonzero(values < 0)
        if len(negative) and not self.allow_negative:
            row = run.rows.positions[np.searchsorted(offsets, negative[0], side="right") - 1]
            raise ValueError(
                f"Column {self.column!r} trains {len(negative)} tokens with negative weights, the first with "
                f"{values[negative[0]]:g} at row {row}. Set allow_negative=True (with normalize='none') if training "
                "against them is meant."
            )
        if not values.any():
            raise ValueError(f"Column {self.column!r} is zero everywhere: nothing would be trained.")

    def weigh(self, batch: Batch) -> Tensor:
        if self._tokens is not None:
            assert isinstance(batch, SequenceBatch)
            return batch.at_tokens(self._tokens.of(batch.ids.cpu().numpy()))
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
