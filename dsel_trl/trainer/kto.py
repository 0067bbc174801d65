"""What KTO has beside its rows: a KL term, estimated on completions that belong to other prompts."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..signals.tap import Reading

Collator = Callable[[list[dict[str, Any]]], dict[str, Any]]


class PairedAnew:
    """
    KTO's collator for batches that a selection puts together: their KL completions are each other's.

    KTO estimates its KL term on prompts with the completions of their neighbours. TRL pairs them beforehand, for the
    batches of the dataset's own order (and forbids any other); here the rows that are served together are paired in
    the same way, each prompt with the completion before it.
    """

    def __init__(self, collator: Collator) -> None:
        self.collator = collator

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        completions = [row["completion_ids"] for row in rows]
        before = completions[-1:] + completions[:-1]
        return self.collator([{**row, "KL_completion_ids": other} for row, other in zip(rows, before, strict=True)])


def paired_anew(trainer: Any, collator: Collator) -> Collator:
    """The collator of batches that are not the dataset's own."""
    # Where images are in the data, TRL's own collator pairs the rows of each batch.
    return PairedAnew(collator) if trainer.calculate_KL and not trainer._is_vision_dataset else collator


def kl_labels(inputs: dict[str, Any]) -> Tensor | None:
    """Labels of the rows of the KL term in a collated batch, -100 where there is no completion."""
    if "KL_completion_mask" not in inputs:
        return None
    return inputs["KL_input_ids"].masked_fill(inputs["KL_completion_mask"] == 0, -100)


def kl_term(trainer: Any, inputs: dict[str, Any], reading: Reading) -> Tensor:
    """KTO's KL term of a training step, the mean over all ranks, as the trainer itself is about to compute it."""
    width = inputs["KL_completion_mask"].shape[1] - 1
    # Both models run the KL rows before the examples: the policy first of all, the reference after the policy.
    policy, *rest = (forward.log_probs[:, -width:].sum(dim=1) for forward in reading.without_gradient[:2])
    reference = inputs["ref_KL_logps"] if trainer.precompute_ref_logps else rest[0]
    return trainer.accelerator.gather_for_metrics((policy - reference).mean()).mean().clamp(min=0)
