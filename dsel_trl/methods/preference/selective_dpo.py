"""The easiest pairs, easy first."""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from ...bases.helper_model import helper_settings
from ...bases.scored import in_order, keep_top, known_scores, paced, tell_ties, tie_rng, untied
from ...bases.unseen import stand_ins, with_unseen
from ...core.cache import cached
from ...core.charges import Charge
from ...core.method import Method, Run, Step
from ...core.parameters import Reads, check_choice, check_range, check_refresh, check_whole, unless, when
from ...core.registry import register
from ...data.difficulty_table import DIFFICULTY, read_table, table_columns, write_table
from ...functional.preference.selective_dpo import (
    half_split,
    learned_step,
    mean_validation_loss,
    pool_fraction,
    rank_in_length_buckets,
)
from ...functional.ranking import keep_count
from ...signals.batch import Batch, Signal
from ...signals.pair_batch import PairBatch

SOURCES = ("cross_fit", "online", "column", "table")
ORDERS = ("strict", "random", "hard_first", "linear_pacing")
HELPER_RUNS = (1, 2, 6, 10)
# What a pair is ranked by, and its column in the table of difficulty.
CRITERIA = {"loss": DIFFICULTY, "learned_step": "learned_step"}
# Online: how often unseen pairs are scored in the first epoch, where `refresh` does not say.
SCORINGS = 5


@register("selective_dpo")
@dataclass
class SelectiveDpo(Method):
    """
    Trains on the easiest share of the pairs, easy first: pairs too hard for the model damage DPO.

    What: difficulty is the validation loss of a pair under a model that has not trained on it
    (hf.co/papers/2502.09650). `source: cross_fit` trains `helpers` helper models on halves of the data and scores the
    other halves, five times per run, averaged (kept under `output_dir/selection`, with a table `difficulty.csv`);
    `online` scores pairs that the run itself has not seen yet, every `refresh` steps of the first epoch, as long as a
    plan is left that can follow it (at the defaults 2.9 forwards per pair in a run of one epoch, 3.4 in a longer one);
    `column` and `table` read a difficulty that exists already: a dataset column, or a CSV/JSON table by `prompt_id` or
    row `id`. With `helpers: 1` only the half that the one helper has not trained on has a difficulty: `keep` is a
    share of that half, and the other one is not trained.
    When: noisy or too difficult preference data; one epoch.
    When not: easy pairs are shorter, so lengths shrink (`length_buckets` ranks within lengths); what is hard but
    right, like mathematics, is dropped too.
    Plan of 1,000,000 examples, difficulty known: 0.2 s and 30 MB.
    """

    source: str = field(default="cross_fit", metadata={"help": f"one of {', '.join(SOURCES)}"})
    keep: float = field(default=0.5, metadata={"help": "share of the easiest pairs to keep, in (0, 1]"})
    order_mode: str = field(default="strict", metadata={"help": f"one of {', '.join(ORDERS)}"})
    helpers: int = field(default=2, metadata={"help": f"cross_fit: helper models, one of {HELPER_RUNS}"})
    criterion_by: str = field(
        default="loss",
        metadata={"help": "cross_fit, table: loss (held out), or learned_step (margin stayed above 0.4; ties: loss)"},
    )
    helper_model: str | None = field(
        default=None,
        metadata={"help": "cross_fit: another model with the same tokenizer; default the policy as it is"},
    )
    helper_lora: bool = field(default=True, metadata={"help": "cross_fit: LoRA (r 16) or full helper models"})
    helper_learning_rate: float | None = field(
        default=None, metadata={"help": "cross_fit: default 3e-4, or without LoRA the run's own"}
    )
    helper_epochs: float = field(default=1.0, metadata={"help": "cross_fit: epochs of each helper run"})
    evaluations: int = field(default=5, metadata={"help": "cross_fit: times each helper is evaluated"})
    column: str = field(default="difficulty", metadata={"help": "column: numeric column, larger = harder"})
    table: str | None = field(default=None, metadata={"help": "table: CSV or JSON file to read the difficulty from"})
    refresh: int | None = field(
        default=None, metadata={"help": "online: score unseen pairs every so many steps; default a fifth of an epoch"}
    )
    pool: int | None = field(default=None, metadata={"help": "online: pairs scored each time; default 8 per step"})
    length_buckets: int = field(default=0, metadata={"help": "rank within this many length buckets; 0 = off"})

    signals = (Signal.POLICY_LOGPS, Signal.REF_LOGPS, Signal.LOSS)
    trainers = ("dpo",)
    paper = "hf.co/papers/2502.09650"
    selector = "top_k, curriculum"
    charges = (
        Charge("helper_trainings", "helpers * helper_epochs / 2", when="source: cross_fit", reference=True),
        Charge("helper_forwards", "helpers * evaluations / 2", when="source: cross_fit", reference=True),
        Charge("forwards", per="unseen pair and scoring", when="source: online", reference=True),
    )
    reads: ClassVar[Reads] = {
        **{
            name: (when("source", "cross_fit"),)
            for name in (
                "helpers",
                "helper_model",
                "helper_lora",
                "helper_learning_rate",
                "helper_epochs",
                "evaluations",
            )
        },
        "criterion_by": (when("source", "cross_fit", "table"),),
        "column": (when("source", "column"),),
        "table": (when("source", "table"),),
        "refresh": (when("source", "online"),),
        "pool": (when("source", "online"),),
        "length_buckets": (unless("source", "online"),),
    }
    renamed: ClassVar[dict[str, str]] = {"refreshes": "refresh (optimizer steps from one scoring to the next)"}
    state = "its score column (8 bytes per example), online also a count"
    LEARNED_STEP: ClassVar[str] = "selective_dpo_learned_step"
    LOSS: ClassVar[str] = "selective_dpo_loss"

    def __post_init__(self) -> None:
        check_choice("source", self.source, SOURCES)
        check_range("keep", self.keep, 0, 1, open_low=True)
        check_choice("order_mode", self.order_mode, ORDERS)
        check_whole("helpers", self.helpers, min(HELPER_RUNS), max(HELPER_RUNS))
        check_choice("helpers", self.helpers, HELPER_RUNS)
        check_choice("criterion_by", self.criterion_by, tuple(CRITERIA))
        if self.refresh is not None:
            check_refresh(self.refresh, ("steps",))
        check_whole("evaluations", self.evaluations, 1, 1000)
        check_whole("length_buckets", self.length_buckets, 0)
        if self.pool is not None:
            check_whole("pool", self.pool, 1)
        if (self.source == "table") != (self.table is not None):
            raise ValueError(f"source={self.source!r} with table={self.table!r}: give both or neither.")
        self._counts = np.empty(0, dtype=np.int32)

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,) if self.source == "column" else ()

    def epoch_size(self, run: Run) -> int:
        return keep_count(self.keep, run.size - int(np.isinf(known_scores(run, self.name)).sum()))

    # ---- Difficulty. The ledger holds its negative: higher = train on it first. ----

    def setup(self, run: Run) -> None:
        run.ledger.add(self.name)
        self._counts = np.zeros(run.size, dtype=np.int32)
        if run.resumed or self.source == "online":
            return
        if self.source == "column":
            difficulty = run.column(self.column)
        elif self.source == "table":
            assert self.table is not None
            difficulty = read_table(self.table, run.dataset, CRITERIA[self.criterion_by])
            if self.criterion_by == "learned_step" and DIFFICULTY in table_columns(self.table):
                run.ledger.write(self.LOSS, None, read_table(self.table, run.dataset), step=0)
        else:
            difficulty = self._cross_fit(run)
        if not np.isfinite(difficulty).any():
            raise ValueError(f"selective_dpo: no pair has a difficulty (source={self.source!r}).")
        difficulty = np.where(np.isfinite(difficulty), difficulty, np.inf)
        if self.length_buckets:
            difficulty = -untied(-difficulty, tie_rng(run, self.name), self._second(run))
            difficulty = rank_in_length_buckets(difficulty, run.completion_lengths, self.length_buckets)
        run.ledger.write(self.name, None, -difficulty, step=0)

    def _cross_fit(self, run: Run) -> np.ndarray:
        """Mean held-out loss of each pair over helper models and evaluations, `(N,)`."""
        # Two helper models share a seed: each of them scores the half that the other trains on.
        if self.helpers == 1:
            run.tell(
                f"{self.name}:half",
                f"{self.name!r}: helpers=1 knows no difficulty of the half of the data that it trains on, which is "
                "left out whole. Set helpers=2 to choose among all pairs.",
                logging.WARNING,
            )
        seeds = [run.stream_seed("selective_dpo/helper", helper // 2) for helper in range(self.helpers)]
        helpers = [helper_settings(self, seed) for seed in seeds]
        measure = lambda: {"margins": self._helper_margins(run, helpers)}  # noqa: E731
        margins = cached(run, "difficulty", [self.evaluations], measure, uses=(), helpers=helpers)["margins"]
        losses = np.full_like(margins, np.nan)
        held_out = np.isfinite(margins)
        losses[held_out] = np.logaddexp(0.0, -margins[held_out])
        table: dict[str, np.ndarray] = {}
        for seed in dict.fromkeys(seeds):
            own = losses[[helper for helper in range(self.helpers) if seeds[helper] == seed]]
            table |= {
                f"loss_step{step}_seed{seed}": mean_validation_loss(own[:, step]) for step in range(self.evaluations)
            }
        table[DIFFICULTY] = mean_validation_loss(losses.reshape(-1, run.size))
        table["learned_step"] = mean_validation_loss(np.stack([_learned_steps(one) for one in margins]))
        run.ledger.write(self.LEARNED_STEP, None, table["learned_step"], step=0)
        if self.criterion_by == "learned_step":
            run.ledger.write(self.LOSS, None, table[DIFFICULTY], step=0)
        if run.passes.rank == 0:
            write_table(Path(run.output_dir) / "selection" / "difficulty.csv", run.dataset, table)
        return table[CRITERIA[self.criterion_by]]

    def _helper_margins(self, run: Run, helpers: list[dict[str, Any]]) -> np.ndarray:
        """Margins of the pairs each helper has not seen, `(helpers, evaluations, N)`, NaN elsewhere."""
        margins = np.full((self.helpers, self.evaluations, run.size), np.nan, dtype=np.float32)
        for number, helper in enumerate(helpers):
            split = half_split(run.size, helper["seed"])
            first = number % 2 == 0
            score_ids = split.first_eval if first else split.second_eval
            margins[number][:, score_ids] = run.train_helper(
                split.first_train if first else split.second_train,
                score_ids,
                _margin,
                evaluations=self.evaluations,
                description=f"Helper model {number + 1}/{self.helpers}, evaluation",
                **helper,
            )
        return margins

    # ---- Online: pairs the run has not trained on yet are held out by construction. ----

    def _interval(self, run: Run) -> int:
        return self.refresh or max(1, round(run.max_steps / max(run.epochs, 1) / SCORINGS))

    def due(self, run: Run) -> bool:
        live = self.source == "online" and run.epoch == 0 and run.step <= self._last_scoring(run)
        return live and run.step % self._interval(run) == 0

    @staticmethod
    def _last_scoring(run: Run) -> int:
        """The last step of the first epoch after which a score can still decide what is trained."""
        steps = round(run.max_steps / max(run.epochs, 1))
        if steps < run.max_steps:
            return steps
        # The loader has drawn some batches ahead of the step: what is measured now is too late for them.
        workers = getattr(run.arguments, "dataloader_num_workers", 0)
        ahead = 1 + workers * (getattr(run.arguments, "dataloader_prefetch_factor", None) or 2)
        return run.max_steps - 1 - -(-ahead // run.arguments.gradient_accumulation_steps)

    def observe(self, run: Run, step: Step) -> None:
        if not self.due(run):
            return
        unseen = np.flatnonzero(run.ledger.visits == 0)
        size = self.pool or 8 * self._interval(run) * len(step.ids)
        if len(unseen) > size:
            unseen = np.sort(run.rng("selective_dpo/pool", run.step).choice(unseen, size, replace=False))
        if not len(unseen):
            return
        margins = run.passes.measure(_margin, unseen, description="Scoring unseen pairs")
        # Before the policy has moved every loss is log 2: that says nothing of difficulty.
        if np.nanstd(margins) <= 1e-6:
            return
        losses = np.full_like(margins, np.nan)
        finite = np.isfinite(margins)
        losses[finite] = np.logaddexp(0.0, -margins[finite])
        known = known_scores(run, self.name)[unseen]
        counts = self._counts[unseen]
        mean = np.where(counts > 0, (-known * counts + losses) / (counts + 1), losses)
        good = np.isfinite(mean)
        # A pair that has been measured in vain is not an unseen one: it is never trained on.
        vain = unseen[~good & (counts == 0)]
        run.ledger.write(self.name, vain, np.full(len(vain), -np.inf), run.step)
        self._counts[unseen[good]] += 1
        run.ledger.write(self.name, unseen[good], -mean[good], run.step)

    def units(self, run: Run) -> dict[str, float]:
        known = super().units(run)
        if self.source != "online":
            return known
        steps, interval = round(run.max_steps / max(run.epochs, 1)), self._interval(run)
        batch = known["candidate"] / max(run.max_steps, 1)
        pairs = sum(
            min(self.pool or 8 * interval * batch, max(run.size - step * batch, 0))
            for step in range(interval, min(steps, self._last_scoring(run)) + 1, interval)
        )
        return {**known, "unseen pair and scoring": pairs}

    # ---- Choice and order ----

    def _second(self, run: Run) -> np.ndarray | None:
        """What decides between pairs that were learned at the same step: the lower loss."""
        return -run.ledger[self.LOSS] if self.LOSS in run.ledger else None

    def _scores(self, run: Run) -> np.ndarray:
        known, second = known_scores(run, self.name), self._second(run)
        tell_ties(run, self.name, known, None if second is None else "the loss")
        filled = self._filled(run, untied(known, tie_rng(run, self.name), second))
        return untied(filled, tie_rng(run, self.name))

    def _filled(self, run: Run, scores: np.ndarray) -> np.ndarray:
        """Scores with a drawn one for each pair that no scoring has met."""
        return with_unseen(scores, run.plan_rng("selective_dpo/unseen"), run.ledger.visits > 0)

    def select(self, run: Run) -> np.ndarray:
        scores = self._scores(run)
        known = known_scores(run, self.name)
        drawn = self._filled(run, known)
        # What was trained on before it was scored can be held out no more.
        late = "; a pair trained on before it was scored has none" if self.source == "online" else ""
        run.decide(np.where(np.isnan(known), drawn, known), f"keep={self.keep:g}{stand_ins(known)}{late}")
        return keep_top(scores, self.keep)

    def order(self, run: Run, ids: np.ndarray) -> np.ndarray:
        rng, scores = run.plan_rng("selective_dpo/order"), self._scores(run)
        if self.order_mode == "random":
            return rng.permutation(ids)
        if self.order_mode == "linear_pacing":
            length = self.epoch_size(run)
            open_share = lambda p: pool_fraction(p, 1.0, 0.1 / max(self.keep, 0.1), 0.8)  # noqa: E731
            return paced(scores, ids, open_share, served=len(run.served), epoch_length=length, rng=rng)
        return in_order(-scores if self.order_mode == "hard_first" else scores, ids)

    def state_dict(self) -> dict[str, Any]:
        return {"counts": self._counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._counts = state["counts"].copy()


def _margin(batch: Batch) -> Tensor:
    assert isinstance(batch, PairBatch)
    return batch.implicit_margin


def _learned_steps(margins: np.ndarray) -> np.ndarray:
    """Learned step of each held-out pair over the evaluations of one helper, NaN for the pairs it trained on."""
    scored = np.isfinite(margins).any(axis=0)
    steps = np.full(margins.shape[1], np.nan)
    steps[scored] = learned_step(margins[:, scored].T)
    return steps
