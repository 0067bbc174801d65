"""Order, sample or keep by any difficulty: length, rarity, loss, or a column."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ...bases.scored import ByScore, known_scores
from ...core.cache import cached
from ...core.method import Run
from ...core.parameters import Reads, check_choice, check_range, given, unless, when
from ...core.registry import register
from ...data.tokens import Sequences
from ...functional.pacing import unigram_rarity
from ...functional.ranking import softmax_weights
from ...functional.text.dsir import inverse_probability_weights
from ...signals.batch import Batch, Signal

SOURCES = ("length", "total_length", "rarity", "loss", "column")


@register("curriculum")
@dataclass
class Curriculum(ByScore):
    """
    Serves examples by their difficulty: from easy to hard by a pacing function, or sampled by it.

    What: difficulty is the trained tokens (`length`, `total_length` with prompts), the rarity of the tokens
    (minus their summed log unigram probability), the loss at the last visit, or a `column`. With `action: curriculum`
    only the easiest `pacing(progress)` share is open (hf.co/papers/2012.03107); `pacing: competence` is the
    square-root competence of hf.co/papers/1903.09848 with `start` as c0 (0.01 there) and `full_at` as its end, where
    equally hard examples open together;
    `pacing_over: run` stretches it over all epochs instead of each. `reverse` starts with the hard ones
    (anti-curriculum); `random_order` opens a random pool that grows alike, the control that a curriculum has to beat.
    With `action: sample` examples are drawn without replacement from softmax(-difficulty / temperature), hard ones
    with `reverse`; with `unbiased` their gradients are divided by their probability, clipped at `clip` (temperature
    and importance sampling). keep_top keeps the easiest, keep_bottom the hardest.
    When: limited time, noisy data. When not: in standard settings most of a curriculum's benefit is that of
    `random_order`.
    Plan of 1,000,000 examples of 8 to 60 tokens: rarity 5 s and 0.8 GB, once; see `length_curriculum` for the order.
    """

    action: str = field(default="curriculum", metadata={"help": "curriculum, sample, keep_top, keep_bottom or band"})
    by: str = field(default="rarity", metadata={"help": f"one of {', '.join(SOURCES)}"})
    column: str | None = field(default=None, metadata={"help": "column: numeric, larger = harder"})
    pacing: str = field(
        default="competence", metadata={"help": "competence, linear, quadratic, root, exponential, log, step or none"}
    )
    pacing_over: str = field(default="epoch", metadata={"help": '"epoch" or "run": what the pacing is stretched over'})
    random_order: bool = field(default=False, metadata={"help": "the control: a pool of the same size, at random"})
    unbiased: bool = field(
        default=False, metadata={"help": "sample: weigh by 1 / probability, so that no bias is left"}
    )
    clip: float = field(default=10.0, metadata={"help": "unbiased: largest weight"})

    signals = (Signal.LENGTH, Signal.LOSS)
    trainers = ("dpo", "sft", "kto")
    paper = "hf.co/papers/1903.09848, hf.co/papers/2012.03107"
    reads: ClassVar[Reads] = {
        "column": (when("by", "column"),),
        "pacing_over": (when("action", "curriculum"), unless("pacing", "none")),
        "unbiased": (when("action", "sample"),),
        "clip": (given("unbiased"),),
    }
    family = "indicator"
    criterion = "internal"
    selector = "curriculum, sample"
    state = "rarity: one column (8 bytes per example); loss: that column"
    actions: ClassVar[tuple[str, ...]] = ("curriculum", "sample", "keep_top", "keep_bottom", "band")
    RARITY: ClassVar[str] = "curriculum_rarity"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("by", self.by, SOURCES)
        check_choice("pacing_over", self.pacing_over, ("epoch", "run"))
        check_range("clip", self.clip, 0, float("inf"), open_low=True)
        if (self.by == "column") != (self.column is not None):
            raise ValueError(
                f"by={self.by!r} with column={self.column!r}: give both by='column' and column, or neither."
            )
        self._weights: np.ndarray | None = None
        self._epoch, self._epochs = 0, 1.0

    @property
    def columns(self) -> tuple[str, ...]:
        return () if self.column is None else (self.column,)

    @property
    def hooks(self) -> frozenset[str]:
        return super().hooks | ({"weigh"} if self.unbiased else set())

    def setup(self, run: Run) -> None:
        if self.by == "rarity" and not run.resumed:
            found = cached(run, "rarity", [], lambda: {"rarity": rarity(run)}, uses=())
            run.ledger.write(self.RARITY, None, found["rarity"], step=0)

    def scores(self, run: Run) -> np.ndarray:
        if self.by == "column":
            assert self.column is not None
            difficulty = np.nan_to_num(run.column(self.column), nan=np.inf)
        elif self.by == "loss":
            difficulty = known_scores(run, "loss")
        elif self.by == "rarity":
            difficulty = run.ledger[self.RARITY]
        else:
            difficulty = run.completion_lengths if self.by == "length" else run.lengths
        scores = -difficulty.astype(np.float32)
        if self.random_order:
            return np.where(
                np.isinf(scores), scores, run.rng("curriculum/random_order").random(run.size, dtype=np.float32)
            )
        return scores

    def order(self, run: Run, ids: np.ndarray) -> np.ndarray:
        self._epoch, self._epochs = run.epoch, max(run.epochs, 1.0)
        if self.unbiased:
            scores = self.scores(run)
            known = np.where(np.isfinite(scores), scores, np.nan)
            p = softmax_weights(-known if self.reverse else known, self.temperature)
            # What is not known yet is drawn like an average example.
            self._weights = inverse_probability_weights(np.where(np.isfinite(known), p, 1 / run.size), self.clip)
        return super().order(run, ids)

    def open_share(self, progress: float) -> float:
        if self.pacing_over == "run":
            progress = (self._epoch + progress) / self._epochs
        return super().open_share(progress)

    def weigh(self, batch: Batch) -> Tensor | None:
        if self._weights is None:
            return None
        return torch.from_numpy(self._weights[batch.ids.cpu().numpy()]).float().to(batch.ids.device)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), **({} if self._weights is None else {"weights": self._weights})}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._weights = state.get("weights")


def rarity(run: Run) -> np.ndarray:
    """Rarity of each example's tokens (a pair's prompt and chosen response) in this dataset, `(N,)` float32."""
    sequences = Sequences(run.rows.side("chosen"))
    tokens = [np.asarray(row, dtype=np.int64) for row, _ in sequences[np.arange(run.size)]]
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in tokens])])
    return unigram_rarity(np.concatenate(tokens), offsets).astype(np.float32)
