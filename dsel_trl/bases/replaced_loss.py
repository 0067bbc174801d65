"""Methods that train another loss than the trainer's, through weights on the trainer's gradient."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from ..core.method import Method, Run
from ..functional.margins import average_logps
from ..signals.batch import Batch
from ..signals.pair_batch import PairBatch


class Averages(NamedTuple):
    """Per-token average log-probabilities of a batch's responses, `(B,)` each."""

    policy_chosen: Tensor
    policy_rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor

    @classmethod
    def of(cls, batch: PairBatch) -> "Averages":
        sums = (
            batch.policy_chosen_logps,
            batch.policy_rejected_logps,
            batch.ref_chosen_logps,
            batch.ref_rejected_logps,
        )
        lengths = (batch.chosen_lengths, batch.rejected_lengths) * 2
        return cls(*(average_logps(total, length) for total, length in zip(sums, lengths, strict=True)))


def check_sigmoid(run: Run, what: str) -> None:
    """Raises `ValueError` unless the trainer's loss is DPO's plain sigmoid loss, which `what` is a form of."""
    arguments = run.arguments
    losses = list(getattr(arguments, "loss_type", ["sigmoid"]))
    if losses != ["sigmoid"]:
        raise ValueError(f"{what} is a form of loss_type 'sigmoid' and cannot be had from {losses}: leave it at that.")
    weights = getattr(arguments, "loss_weights", None)
    if weights is not None and list(weights) != [1.0]:
        raise ValueError(f"{what} replaces the loss as a whole: leave loss_weights={weights} out.")
    divergence = getattr(arguments, "f_divergence_type", "reverse_kl")
    if getattr(divergence, "value", divergence) != "reverse_kl":
        raise ValueError(f"{what} knows log-ratio margins only: leave f_divergence_type={divergence!r} out.")
    if getattr(arguments, "ld_alpha", None) is not None:
        raise ValueError(f"{what} knows plain sums of log-probabilities: leave ld_alpha={arguments.ld_alpha} out.")


@dataclass
class LossForm(Method):
    """
    A method whose loss is another function of a pair's log-probabilities than DPO's sigmoid loss.

    `weigh` gives the factors that turn the gradient of the one into that of the other, per pair or per row. They are
    the loss itself, not an importance, so they are never normalised; the logged `loss` stays the trainer's.
    """

    trainers = ("dpo",)
    selector = "weight"
    own_loss = True
    normalize = "none"

    def check(self, run: Run) -> None:
        check_sigmoid(run, self.name)

    @staticmethod
    def stock(batch: Batch) -> dict[str, Any]:
        """Arguments by which the `*_gate_rows` functions know the trainer's loss and the lengths."""
        assert isinstance(batch, PairBatch)
        return {
            "chosen_lengths": batch.chosen_lengths,
            "rejected_lengths": batch.rejected_lengths,
            "stock_margin": batch.implicit_margin,
            "stock_beta": batch.settings.beta,
        }
