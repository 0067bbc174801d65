"""A second opinion on each example: losses under a model that knows better, measured once and kept."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..core.charges import Charge
from ..core.method import Method
from ..core.parameters import Reads, check_range, given
from ..core.run import Run
from ..data.tokens import Sequences
from ..scorers.language_model import LanguageModel
from ..signals.batch import Batch, Forward
from ..signals.tap import label_log_probs
from .helper_model import helper_settings


@dataclass
class SecondModel(Method):
    """
    A method that compares the policy with a second model: one that exists, or a helper trained before the run on
    the rows that a column marks as clean.
    """

    model: str | None = field(
        default=None, metadata={"help": "another causal model to ask, by path; it must share the policy's tokenizer"}
    )
    clean_column: str | None = field(
        default=None,
        metadata={"help": "instead: train a helper model on the rows where this column exceeds clean_above"},
    )
    clean_above: float = field(default=0.0, metadata={"help": "value of clean_column above which a row is clean"})
    helper_epochs: float = field(default=1.0, metadata={"help": "epochs of the helper run"})
    helper_learning_rate: float | None = field(
        default=None, metadata={"help": "of the helper; default 3e-4, or without LoRA the run's own"}
    )
    helper_lora: bool = field(default=True, metadata={"help": "LoRA (r 16) or a full helper model"})

    charges: ClassVar[tuple[Charge, ...]] = (
        Charge("scorer_forwards", when="model", reference=True),
        Charge("helper_trainings", "helper_epochs", per="clean row", when="clean_column", reference=True),
        Charge("helper_forwards", when="clean_column", reference=True),
    )
    reads: ClassVar[Reads] = {
        name: (given("clean_column"),)
        for name in ("clean_above", "helper_epochs", "helper_learning_rate", "helper_lora")
    }
    renamed: ClassVar[dict[str, str]] = {"reference": "model"}

    @property
    def columns(self) -> tuple[str, ...]:
        return () if self.clean_column is None else (self.clean_column,)

    def check_second(self, also: tuple[str, ...] = ()) -> None:
        """Raises `ValueError` unless exactly one source of the second model's losses is given."""
        names = ("model", "clean_column", *also)
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"{self.name!r} needs exactly one of {list(names)}, but {given or 'none'} is given.")
        check_range("helper_epochs", self.helper_epochs, 0, float("inf"), open_low=True)

    def check(self, run: Run) -> None:
        if run.size == 0:
            raise ValueError(f"{self.name!r} measures a second model before training, which a stream does not allow.")
        if self.clean_column is not None and not (run.column(self.clean_column) > self.clean_above).any():
            raise ValueError(
                f"clean_column={self.clean_column!r} marks no row as clean: none exceeds "
                f"clean_above={self.clean_above!r}."
            )

    def units(self, run: Run) -> dict[str, float]:
        clean = 0 if self.clean_column is None else int((run.column(self.clean_column) > self.clean_above).sum())
        return {**super().units(run), "clean row": clean}

    @property
    def second_parts(self) -> list[Any]:
        """What the second model's losses depend on beside the run: JSON values."""
        return [self.model, self.clean_column, self.clean_above]

    def second_key(self, run: Run) -> dict[str, Any]:
        """What of the run the second model's losses depend on, as [`~dsel_trl.core.cache.cached`] takes it."""
        if self.model is None:
            return {"columns": self.columns, "uses": (), "helpers": [self._helper_settings(run)]}
        # A pair's loss is that of the run, with the second model in the policy's place.
        return {"columns": self.columns, "uses": () if run.trainer == "sft" else ("loss",)}

    def _helper_settings(self, run: Run) -> dict[str, Any]:
        return helper_settings(self, run.stream_seed(f"{self.name}/reference"))

    def second_losses(self, run: Run) -> np.ndarray:
        """Loss of every example under the second model, `(N,)` float32: mean token loss, or the loss of the pair."""
        if self.model is None:
            return self._helper(run)[0]
        return run.passes.measure(
            _loss, forward=self._pairs(run), **self._inputs(run), description="Losses of the second model"
        )

    def second_tokens(self, run: Run, sizes: np.ndarray) -> np.ndarray:
        """Log-probability of every trained token under the second model, one example after another (SFT)."""
        if self.model is None:

            def evaluate(forward: Any) -> np.ndarray:
                return run.passes.measure_tokens(sizes, forward=forward, **self._inputs(run))

            return self._helper(run, evaluate=evaluate)[0]
        return run.passes.measure_tokens(
            sizes, forward=self._pairs(run), **self._inputs(run), description="Tokens under the second model"
        )

    def _inputs(self, run: Run) -> dict[str, Any]:
        """Sequences one per row, whatever layout the trainer's collator gives them."""
        if run.rows.layout.pairs:
            return {}
        sequences = Sequences(run.rows.side("chosen"))
        return {"inputs": sequences.collate(), "lengths": sequences.scan()[0]}

    def _pairs(self, run: Run) -> Any:
        assert self.model is not None
        model = LanguageModel(self.model, run.model.device)
        known, needed = model.model.config.get_text_config().vocab_size, len(run.processing_class)
        if known < needed:
            raise ValueError(
                f"model={self.model!r} knows {known} tokens, the run's tokenizer has {needed}: it must share "
                "the policy's tokenizer."
            )
        return partial(_pair_forward, run, model) if run.rows.layout.pairs else model.forward

    def _helper(self, run: Run, **how: Any) -> np.ndarray:
        assert self.clean_column is not None
        return run.train_helper(
            np.flatnonzero(run.column(self.clean_column) > self.clean_above),
            np.arange(run.size),
            _loss,
            evaluations=1,
            description="Helper model, evaluation",
            **self._helper_settings(run),
            **how,
        )


def _loss(batch: Batch) -> Tensor:
    return batch.loss


@torch.no_grad()
def _pair_forward(run: Run, model: LanguageModel, inputs: dict[str, Any], ids: Tensor) -> Batch:
    """Pairs with the second model in the policy's place: their loss, had the policy been trained to it."""
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    output = model.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
    run.costs.ran("scorer_forwards", ids.numel(), int(inputs["attention_mask"].sum()))
    return run.passes.forward(inputs, ids, policy=Forward(label_log_probs(output.logits, labels)))
