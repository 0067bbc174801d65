"""A second opinion on each example: losses under a reference model, measured once and kept."""

import dataclasses
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..core.charges import Charge
from ..core.method import Method
from ..core.parameters import check_range
from ..core.run import Run
from ..data.tokens import Sequences
from ..scorers.language_model import LanguageModel
from ..signals.batch import Batch, Forward
from ..signals.tap import label_log_probs


@dataclass
class WithReference(Method):
    """
    A method that compares the policy with a reference model: one that exists, or a helper trained before the run on
    the rows that a column marks as clean.
    """

    reference: str | None = field(
        default=None, metadata={"help": "reference model by path; it must share the policy's tokenizer"}
    )
    clean_column: str | None = field(
        default=None,
        metadata={"help": "instead: train a helper model on the rows where this column exceeds clean_above"},
    )
    clean_above: float = field(default=0.0, metadata={"help": "value of clean_column above which a row is clean"})
    helper_epochs: float = field(default=1.0, metadata={"help": "epochs of the helper run"})
    helper_learning_rate: float | None = field(default=None, metadata={"help": "of the helper; default the run's own"})
    helper_lora: bool = field(default=True, metadata={"help": "LoRA (r 16) or a full helper model"})

    charges: ClassVar[tuple[Charge, ...]] = (
        Charge("scorer_forwards", when="reference", reference=True),
        Charge("helper_trainings", "helper_epochs", per="clean row", when="clean_column", reference=True),
        Charge("helper_forwards", when="clean_column", reference=True),
    )

    @property
    def columns(self) -> tuple[str, ...]:
        return () if self.clean_column is None else (self.clean_column,)

    def check_reference(self, also: tuple[str, ...] = ()) -> None:
        """Raises `ValueError` unless exactly one source of the reference is given."""
        names = ("reference", "clean_column", *also)
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"{self.name!r} needs exactly one of {list(names)}, but {given or 'none'} is given.")
        check_range("helper_epochs", self.helper_epochs, 0, float("inf"), open_low=True)

    def check(self, run: Run) -> None:
        if run.size == 0:
            raise ValueError(f"{self.name!r} measures a reference before training, which a stream does not allow.")
        if self.clean_column is not None and not (run.column(self.clean_column) > self.clean_above).any():
            raise ValueError(
                f"clean_column={self.clean_column!r} marks no row as clean: none exceeds "
                f"clean_above={self.clean_above!r}."
            )

    def units(self, run: Run) -> dict[str, float]:
        clean = 0 if self.clean_column is None else int((run.column(self.clean_column) > self.clean_above).sum())
        return {**super().units(run), "clean row": clean}

    @property
    def reference_parts(self) -> list[Any]:
        """What the reference depends on beside the run: JSON values."""
        return [getattr(self, f.name) for f in dataclasses.fields(WithReference) if f.init]

    def reference_losses(self, run: Run) -> np.ndarray:
        """Loss of every example under the reference, `(N,)` float32: mean token loss, or the loss of the pair."""
        assert run.passes is not None
        if self.reference is None:
            return self._helper(run)[0]
        return run.passes.measure(_loss, forward=self._pairs(run), **self._rows(run), description="Reference losses")

    def reference_tokens(self, run: Run, sizes: np.ndarray) -> np.ndarray:
        """Log-probability of every trained token under the reference, one example after another (SFT)."""
        assert run.passes is not None
        if self.reference is None:

            def evaluate(forward: Any) -> np.ndarray:
                return run.passes.measure_tokens(sizes, forward=forward, **self._rows(run))  # type: ignore[union-attr]

            return self._helper(run, evaluate=evaluate)[0]
        return run.passes.measure_tokens(
            sizes, forward=self._pairs(run), **self._rows(run), description="Reference tokens"
        )

    def _rows(self, run: Run) -> dict[str, Any]:
        """Sequences one per row, whatever layout the trainer's collator gives them."""
        if run.trainer == "dpo":
            return {}
        sequences = Sequences(run)
        return {"rows": sequences.collate(), "lengths": sequences.scan()[0]}

    def _pairs(self, run: Run) -> Any:
        assert self.reference is not None
        model = LanguageModel(self.reference, run.model.device, "reference")
        known, needed = model.model.config.get_text_config().vocab_size, len(run.processing_class)
        if known < needed:
            raise ValueError(
                f"reference={self.reference!r} knows {known} tokens, the run's tokenizer has {needed}: it must share "
                "the policy's tokenizer."
            )
        return model.forward if run.trainer == "sft" else partial(_pair_forward, run, model)

    def _helper(self, run: Run, **how: Any) -> np.ndarray:
        assert run.proxy is not None
        assert self.clean_column is not None
        return run.proxy(
            np.flatnonzero(run.column(self.clean_column) > self.clean_above),
            np.arange(run.size),
            _loss,
            evaluations=1,
            epochs=self.helper_epochs,
            learning_rate=self.helper_learning_rate,
            lora=self.helper_lora,
            seed=run.seed,
            description="Reference",
            **how,
        )


def _loss(batch: Batch) -> Tensor:
    return batch.loss


@torch.no_grad()
def _pair_forward(run: Run, model: LanguageModel, inputs: dict[str, Any], ids: Tensor) -> Batch:
    """Pairs with the reference in the policy's place: what their loss would be, had the policy been trained to it."""
    assert run.passes is not None
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    output = model.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
    run.costs.ran("scorer_forwards", ids.numel(), int(inputs["attention_mask"].sum()))
    return run.passes.forward(inputs, ids, policy=Forward(label_log_probs(output.logits, labels)))
