"""EDGE: the examples that a written guideline does not help with."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from ...bases.offline import Prescored
from ...core.charges import Charge
from ...core.method import Run
from ...core.parameters import REFRESHES, check_choice
from ...core.registry import register
from ...data.columns import without_truth
from ...data.tokens import IGNORED, Sequences
from ...functional.text.edge import AGGREGATES, FORMS, edge_scores, guideline_effect, mean_turn_nll
from ...scorers.rewards import load_reward
from ...signals.batch import Signal


@register("edge")
@dataclass
class Edge(Prescored):
    """
    Keeps the examples on which a written guideline helps the model least: what it takes to answer is not in there.

    Reconstruction: no code of the paper (hf.co/papers/2502.12494) is public. The definition follows its abstract;
    whether the paper divides or subtracts, and how it averages, is not known, hence `form` and `aggregate`.
    What: the loss of each response is measured twice, with and without the guideline in front of the prompt, over the
    same response tokens; the effectiveness is the ratio (or difference) without / with, averaged over the turns. The
    lowest `keep` is trained, or everything weighed by exp(-effectiveness / temperature) (`action: weight`). It is
    measured again with the policy each epoch (`refresh: epoch`): what has been learned no longer profits from the
    guideline.
    `guideline` is a text, or 'module:function' (or a function) that gives one for each row. Of a pair the chosen
    response is the action. With `action: weight` a renewal acts from the second step of an epoch on.
    When: tasks with rules that can be written down, such as tool use and multi-step interaction. When not: a guideline
    that says nothing of the task makes every effectiveness 1.
    Memory of a pass: 8 bytes per response token (2.4 GB for 1,000,000 examples of 300).
    Plan of 1,000,000 examples, losses known: 0.1 s and 64 MB.
    """

    keep: float | None = field(default=0.5, metadata={"help": "fraction to keep, in (0, 1]"})
    guideline: Any = field(default=None, metadata={"help": "required: a text, or 'module:function' of a row"})
    form: str = field(default="ratio", metadata={"help": f"one of {', '.join(FORMS)}"})
    aggregate: str = field(default="mean_turn", metadata={"help": f"over the turns: one of {', '.join(AGGREGATES)}"})
    refresh: int | str = field(
        default="epoch", metadata={"help": 'when to measure anew: "epoch", "never" (once, before training), or steps'}
    )

    signals = (Signal.TOKEN_LOGPS, Signal.TEXT)
    paper = "hf.co/papers/2502.12494 (reconstruction)"
    family = "indicator"
    criterion = "internal"
    selector = "bottom_k"
    charges = (Charge("forwards", "2", per="example and measurement"),)
    state = "its score column (8 bytes per example)"
    refreshes = REFRESHES
    actions: ClassVar[tuple[str, ...]] = ("keep_top", "keep_bottom", "band", "weight", "sample", "curriculum")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("form", self.form, FORMS)
        check_choice("aggregate", self.aggregate, AGGREGATES)
        if not self.guideline or not (isinstance(self.guideline, str) or callable(self.guideline)):
            raise ValueError(f"guideline={self.guideline!r}: a text is needed, or 'module:function' that gives one.")
        self._median: float | None = None

    @property
    def _write_guideline(self) -> Callable[[dict[str, Any]], str]:
        guideline = self.guideline
        if isinstance(guideline, str) and not _names_function(guideline):
            return lambda row: guideline
        function: Any = load_reward(guideline)
        return function

    def check(self, run: Run) -> None:
        super().check(run)
        text = self._write_guideline(without_truth(run.dataset[0]))
        if not isinstance(text, str):
            raise ValueError(f"guideline={self.guideline!r} gave {type(text).__name__} for the first row, not a text.")
        longest = getattr(run.model.config.get_text_config(), "max_position_embeddings", None)
        needed = len(self._tokens(run, text)) + int(Sequences(run.rows.side("chosen")).scan()[0].max(initial=0))
        if longest is not None and needed > longest:
            raise ValueError(
                f"The guideline and the longest example take {needed} tokens, but the model holds {longest}: shorten "
                f"the guideline, or lower max_length={run.arguments.max_length}."
            )

    @staticmethod
    def _tokens(run: Run, text: str) -> list[int]:
        return run.processing_class(text + "\n", add_special_tokens=False)["input_ids"]

    @property
    def uses(self) -> tuple[str, ...]:
        return ("policy",)

    def measure(self, run: Run) -> dict[str, np.ndarray]:
        sequences, write = Sequences(run.rows.side("chosen")), self._write_guideline
        lengths, trained = sequences.scan()
        if isinstance(self.guideline, str) and not _names_function(self.guideline):
            common = self._tokens(run, self.guideline)
            guide, sizes = (lambda i: common), np.full(run.size, len(common))
        else:
            guides = [self._tokens(run, write(without_truth(row))) for row in run.dataset]
            guide, sizes = (lambda i: guides[i]), np.array([len(tokens) for tokens in guides])
        first = run.processing_class.bos_token_id

        def guided(i: int, tokens: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
            start = int(bool(tokens) and tokens[0] == first)
            own = guide(i)
            # The first token has nothing before it without the guideline: it is scored in neither pass.
            hidden = [IGNORED] * (len(own) + 1) + labels[1:]
            return tokens[:start] + own + tokens[start:], hidden

        plain = run.passes.measure_tokens(
            trained, inputs=sequences.collate(), lengths=lengths, description="Without the guideline"
        )
        helped = run.passes.measure_tokens(
            trained, inputs=sequences.collate(guided), lengths=lengths + sizes, description="With the guideline"
        )
        starts = sequences.turn_starts(trained)
        turn = np.cumsum(starts) - 1
        without, counts = mean_turn_nll(-plain, turn, int(starts.sum()))
        with_it, _ = mean_turn_nll(-helped, turn, len(counts))
        owner = np.repeat(np.arange(run.size), trained)[starts]
        effect = guideline_effect(without, with_it, self.form)
        effectiveness = edge_scores(effect, owner, run.size, aggregate=self.aggregate, num_tokens=counts)
        return {"edge_effectiveness": effectiveness, self.name: -effectiveness}

    def _write(self, run: Run, arrays: dict[str, np.ndarray]) -> None:
        super()._write(run, arrays)
        self._median = None

    def weights(self, scores: np.ndarray) -> np.ndarray:
        if self._median is None:
            known = self._ledger()
            self._median = float(np.median(known[np.isfinite(known)].astype(np.float64)))
        return np.exp(np.clip((scores - self._median) / self.temperature, -60.0, 60.0))


def _names_function(text: str) -> bool:
    """Whether a text is `module:function` rather than words."""
    module, colon, name = text.partition(":")
    parts = [*module.split("."), *name.split(".")]
    return bool(colon) and all(part.isidentifier() for part in parts) and not inspect.cleandoc(text).count(" ")
