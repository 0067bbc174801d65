"""Perplexity bands: the easy, the middle or the hard part of the data."""

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from ...bases.offline import Prescored
from ...core.charges import Charge
from ...core.method import Run
from ...core.parameters import REFRESHES, Reads, check_choice, never, unless, when
from ...core.registry import register
from ...data.conversations import example_messages, prompt_and_answer, text_columns
from ...data.tokens import Sequences
from ...functional.text.perplexity import BANDS, perplexity_band
from ...scorers.language_model import LanguageModel, sequence_losses
from ...signals.batch import Signal


@register("perplexity")
@dataclass
class Perplexity(Prescored):
    """
    Keeps a band of the perplexity range: the examples the model finds easy, middling or hard.

    What: the mean token loss of each example (its logarithm of the perplexity) under the policy before training, under
    another `model`, or under the policy of the moment (`refresh`); `band` keeps the share `keep` that is lowest, in
    the middle, or highest (hf.co/papers/2309.04564). Of a pair, the chosen response counts.
    When: pruning web text (middle or high), or noisy data (not the highest). When not: no band is best everywhere, so
    compare them; low perplexity is often mere repetition.
    Plan of 1,000,000 examples, losses known: 0.4 s and 14 MB.
    """

    action: str = field(
        default="band", metadata={"help": "band (keep `band`), or another: sample, curriculum, weight"}
    )
    keep: float | None = field(default=0.5, metadata={"help": "fraction to keep, in (0, 1]"})
    band: str = field(default="mid", metadata={"help": f"one of {', '.join(BANDS)}"})
    model: str | None = field(default=None, metadata={"help": "another causal model to ask, by path"})

    signals = (Signal.LOSS,)
    trainers = ("dpo", "sft", "kto")
    paper = "hf.co/papers/2309.04564"
    reads: ClassVar[Reads] = {
        "band": (when("action", "band"),),
        "keep": (unless("action", "weight"),),
        "low": (never("set keep and band"),),
        "high": (never("set keep and band"),),
    }
    family = "indicator"
    criterion = "internal"
    selector = "band"
    charges = (
        Charge("forwards", per="example and measurement", when="no model"),
        Charge("scorer_forwards", when="model"),
    )
    state = "its score column (8 bytes per example)"
    refreshes = REFRESHES
    actions: ClassVar[tuple[str, ...]] = ("band", "weight", "sample", "curriculum")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("band", self.band, BANDS)
        if self.refresh != "never" and self.model is not None:
            raise ValueError(
                f"refresh={self.refresh!r} measures the policy again, but model={self.model!r} never changes."
            )

    @property
    def keep_share(self) -> float:
        return 1.0 if self.keep is None else self.keep

    def check(self, run: Run) -> None:
        super().check(run)
        if self.model is not None:
            text_columns(run.rows)

    @property
    def uses(self) -> tuple[str, ...]:
        return ("policy",) if self.model is None else ()

    def measure(self, run: Run) -> dict[str, np.ndarray]:
        if self.model is not None:
            model = LanguageModel(self.model, run.model.device)
            rows = [
                model.encode(*prompt_and_answer(messages)) for messages in example_messages(run.rows.side("chosen"))
            ]
            return {self.name: sequence_losses(run, rows, model, "Perplexity")}
        sequences = Sequences(run.rows.side("chosen"))
        tokens, trained = sequences.scan()
        losses = run.passes.measure(
            lambda batch: batch.loss, inputs=sequences.collate(), lengths=tokens, description="Perplexity"
        )
        return {self.name: np.where(trained > 0, losses, np.nan)}

    def chosen(self, run: Run, scores: np.ndarray) -> np.ndarray:
        if self.action == "band":
            return perplexity_band(scores, self.keep_share, self.band)
        return super().chosen(run, scores)
