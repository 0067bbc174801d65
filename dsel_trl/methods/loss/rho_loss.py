"""Train on what can be learned and is not learned yet."""

from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ...bases.helper_model import helper_settings
from ...bases.scored import known_scores
from ...core.cache import cached
from ...core.charges import Charge
from ...core.method import Method, Run
from ...core.parameters import Reads, check_choice, check_range, check_whole, unless, when
from ...core.registry import register
from ...functional.loss.rho_loss import median_irreducible, reducible_loss
from ...functional.loss.select_k_of_b import select_k_of_b
from ...functional.preference.selective_dpo import half_split
from ...functional.ranking import keep_count
from ...signals.batch import Batch, Signal

SOURCES = ("cross_fit", "holdout", "column")
LEFT_OUT = "not picked among its candidates (reducible loss), or held out for the helper (0)"


@register("rho_loss")
@dataclass
class RhoLoss(Method):
    """
    Draws `factor` times as many candidates as are trained, and trains on those with the largest reducible loss.

    What: reducible loss = current loss - irreducible loss, where the latter is that of a helper model which has not
    trained on the example (hf.co/papers/2206.07137): `source: holdout` trains the helper on a random share of the data
    that the run itself then leaves out; `cross_fit` trains two helpers, each on one half, to score the other; `column`
    reads it. Measured once and kept under `output_dir/selection`. The loss is the trainer's own per pair, or the mean
    per token for SFT. Acts at once, over the candidates of all processes.
    When: noisy labels: what is noise has a high irreducible loss and is skipped; redundant data.
    When not: it costs `factor` extra forwards per trained example (twice that with a reference model that is not
    precomputed), and an epoch has `1 / factor` of the steps.
    """

    factor: int = field(default=10, metadata={"help": "candidates drawn for one trained example, at least 2"})
    source: str = field(default="cross_fit", metadata={"help": f"irreducible loss: one of {', '.join(SOURCES)}"})
    column: str = field(default="irreducible_loss", metadata={"help": "column: numeric column with the loss"})
    holdout: float = field(
        default=0.2, metadata={"help": "holdout: share of the data for the helper model, in (0, 1)"}
    )
    helper_model: str | None = field(
        default=None, metadata={"help": "another (smaller) model with the same tokenizer; default the policy as it is"}
    )
    helper_lora: bool = field(default=True, metadata={"help": "helper models: LoRA (r 16) or full fine-tuning"})
    helper_epochs: float = field(default=1.0, metadata={"help": "helper models: epochs"})
    helper_learning_rate: float | None = field(
        default=None, metadata={"help": "helper models: default 3e-4, or without LoRA the run's own"}
    )

    signals = (Signal.LOSS,)
    paper = "hf.co/papers/2206.07137"
    reads: ClassVar[Reads] = {
        "column": (when("source", "column"),),
        "holdout": (when("source", "holdout"),),
        **{
            name: (unless("source", "column"),)
            for name in ("helper_model", "helper_lora", "helper_epochs", "helper_learning_rate")
        },
    }
    criterion = "external_continuous"
    selector = "top_k of the candidates"
    charges = (
        Charge("forwards", per="candidate", reference=True),
        Charge("helper_trainings", "helper_epochs", when="source: cross_fit", reference=True),
        Charge("helper_forwards", when="source: cross_fit", reference=True),
        Charge("helper_trainings", "helper_epochs", per="held-out example", when="source: holdout", reference=True),
        Charge("helper_forwards", per="other example", when="source: holdout", reference=True),
    )
    cost = "factor candidates per trained example"
    state = "the irreducible loss (8 bytes per example)"

    def __post_init__(self) -> None:
        check_whole("factor", self.factor, 2, 1024)
        check_choice("source", self.source, SOURCES)
        check_range("holdout", self.holdout, 0, 1, open_low=True, open_high=True)
        check_range("helper_epochs", self.helper_epochs, 0, 1000, open_low=True)
        self._irreducible = np.empty(0, dtype=np.float32)
        self._held_out = np.empty(0, dtype=bool)

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,) if self.source == "column" else ()

    @property
    def candidates(self) -> int:
        return self.factor

    @property
    def hooks(self) -> frozenset[str]:
        return super().hooks if self.source == "holdout" else super().hooks - {"select"}

    def units(self, run: Run) -> dict[str, float]:
        held_out = keep_count(self.holdout, run.size)
        return {**super().units(run), "held-out example": held_out, "other example": run.size - held_out}

    # ---- The irreducible loss ----

    def setup(self, run: Run) -> None:
        name = f"{self.name}_irreducible"
        self._held_out = np.zeros(run.size, dtype=bool)
        size = keep_count(self.holdout, run.size)
        self._held_out[run.rng("rho_loss/holdout").choice(run.size, size, replace=False)] = True
        if not run.resumed:
            run.ledger.write(name, None, self._measure(run), step=0)
        self._irreducible = known_scores(run, name).copy()

    def _measure(self, run: Run) -> np.ndarray:
        if self.source == "column":
            return run.column(self.column)
        count = 1 if self.source == "holdout" else 2
        helpers = [helper_settings(self, run.stream_seed("rho_loss/helper", number)) for number in range(count)]
        parts = [self.source, self.holdout if self.source == "holdout" else None]
        measure = lambda: {"loss": self._helper_losses(run, helpers)}  # noqa: E731
        return cached(run, "irreducible-loss", parts, measure, uses=("seed",), helpers=helpers)["loss"]

    def _helper_losses(self, run: Run, helpers: list[dict[str, Any]]) -> np.ndarray:
        if self.source == "holdout":
            halves = [(np.flatnonzero(self._held_out), np.flatnonzero(~self._held_out))]
        else:
            split = half_split(run.size, run.stream_seed("rho_loss/halves"))
            halves = [(split.first_train, split.first_eval), (split.second_train, split.second_eval)]
        losses = np.full(run.size, np.nan, dtype=np.float32)
        for number, (train_ids, score_ids) in enumerate(halves):
            losses[score_ids] = run.train_helper(
                train_ids,
                score_ids,
                attrgetter("loss"),
                evaluations=1,
                description=f"Helper model {number + 1}/{len(halves)}, evaluation",
                **helpers[number],
            )[-1]
        return losses

    # ---- The choice ----

    def epoch_size(self, run: Run) -> int | None:
        return int((~self._held_out).sum()) if self.source == "holdout" else None

    def select(self, run: Run) -> np.ndarray:
        if self._held_out.any():
            ids = np.flatnonzero(self._held_out)
            run.ledger.decide(self.name, ids, np.zeros(len(ids)), run.step, LEFT_OUT)
        return ~self._held_out

    def score(self, batch: Batch) -> Tensor:
        return torch.from_numpy(self._reducible(batch.loss, batch.ids)).float().to(batch.ids.device)

    def _reducible(self, losses: Tensor, ids: Tensor) -> np.ndarray:
        floors = self._irreducible[ids.cpu().numpy()]
        return reducible_loss(losses.cpu().numpy(), floors, median_irreducible(self._irreducible))

    def pick(self, run: Run, candidates: Batch) -> Tensor:
        losses, _ = candidates.gather(candidates.loss)
        ids, _ = candidates.gather(candidates.ids)
        count = max(1, len(losses) // self.factor)
        rng = run.rng("rho_loss/pick", run.step, len(losses))
        scores = self._reducible(losses, ids)
        run.ledger.decide(self.name, ids.cpu().numpy(), scores, run.step, LEFT_OUT, picks=True)
        positions = select_k_of_b(scores, count, "top_k", fill=True, rng=rng)
        return torch.as_tensor(positions[:count].copy())
