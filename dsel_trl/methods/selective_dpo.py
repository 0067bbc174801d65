"""The easiest pairs, easy first."""

import csv
import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from ..data.columns import dataset_fingerprint
from ..functional.ranking import keep_count
from ..functional.selective_dpo import half_split, learned_step, pool_fraction, rank_in_length_buckets
from ..method import Method, Run, Step, check_choice, check_range, register
from ..selection import in_order, keep_top, known_scores, paced, with_unseen
from ..sidecar import write_json
from ..tap import Batch, PairBatch, Signal

SOURCES = ("cross_fit", "online", "column", "table")
ORDERS = ("strict", "random", "hard_first", "linear_pacing")
HELPER_RUNS = (1, 2, 6, 10)
FIRST_SEED = 41


@register("selective_dpo")
@dataclass
class SelectiveDpo(Method):
    """
    Trains on the easiest share of the pairs, easy first: pairs too hard for the model damage DPO.

    What: difficulty is the validation loss of a pair under a model that has not trained on it
    (hf.co/papers/2502.09650). `source: cross_fit` trains `helpers` helper models on halves of the data and scores the
    other halves, five times per run, averaged (kept under `output_dir/selection` by fingerprint); `online` scores
    pairs that the run itself has not seen yet, `refreshes` times in the first epoch; `column` and `table` read a
    difficulty that exists already (a dataset column, or a CSV/JSON table id -> difficulty).
    When: noisy or too difficult preference data; one epoch.
    When not: easy pairs are shorter, so lengths shrink (`length_buckets` ranks within lengths); what is hard but
    right, like mathematics, is dropped too.
    """

    source: str = field(default="cross_fit", metadata={"help": f"one of {', '.join(SOURCES)}"})
    keep: float = field(default=0.5, metadata={"help": "share of the easiest pairs to keep, in (0, 1]"})
    order_mode: str = field(default="strict", metadata={"help": f"one of {', '.join(ORDERS)}"})
    helpers: int = field(default=2, metadata={"help": f"cross_fit: helper models, one of {HELPER_RUNS}"})
    helper_lora: bool = field(default=True, metadata={"help": "cross_fit: LoRA (r 16) or full helper models"})
    helper_learning_rate: float | None = field(default=None, metadata={"help": "cross_fit: default the run's own"})
    helper_epochs: float = field(default=1.0, metadata={"help": "cross_fit: epochs of each helper run"})
    evaluations: int = field(default=5, metadata={"help": "cross_fit: times each helper is evaluated"})
    column: str = field(default="difficulty", metadata={"help": "column: numeric column, larger = harder"})
    table: str | None = field(default=None, metadata={"help": "table: CSV or JSON file to read the difficulty from"})
    refreshes: int = field(default=5, metadata={"help": "online: scorings in the first epoch"})
    pool: int | None = field(default=None, metadata={"help": "online: pairs scored each time; default 8 per step"})
    length_buckets: int = field(default=0, metadata={"help": "rank within this many length buckets; 0 = off"})

    signals = (Signal.POLICY_LOGPS, Signal.REF_LOGPS, Signal.LOSS)
    trainers = ("dpo",)
    paper = "hf.co/papers/2502.09650"
    selector = "top_k, curriculum"
    cost = "cross_fit: helpers/2 epochs of training, 2.5 x helpers forwards a pair; online: up to 2 forwards a pair"
    state = "its score column (8 bytes per example), online also a count"
    LEARNED_STEP: ClassVar[str] = "selective_dpo_learned_step"

    def __post_init__(self) -> None:
        check_choice("source", self.source, SOURCES)
        check_range("keep", self.keep, 0, 1, open_low=True)
        check_choice("order_mode", self.order_mode, ORDERS)
        check_choice("helpers", self.helpers, HELPER_RUNS)
        check_range("refreshes", self.refreshes, 1, 10_000)
        check_range("evaluations", self.evaluations, 1, 1000)
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
            difficulty = read_difficulty(self.table, run.size)
        else:
            difficulty = self._cross_fit(run)
        if not np.isfinite(difficulty).any():
            raise ValueError(f"selective_dpo: no pair has a difficulty (source={self.source!r}).")
        difficulty = np.where(np.isfinite(difficulty), difficulty, np.inf)
        if self.length_buckets:
            difficulty = rank_in_length_buckets(difficulty, run.completion_lengths, self.length_buckets)
        run.ledger.write(self.name, None, -difficulty, step=0)

    def _cross_fit(self, run: Run) -> np.ndarray:
        """Mean held-out loss of each pair over helper models and evaluations, `(N,)`."""
        file = Path(run.output_dir) / "selection" / f"difficulty-{self._fingerprint(run)}.json"
        if file.is_file():
            run.ledger.write(self.LEARNED_STEP, None, _read_table(file, run.size, "learned_step"), step=0)
            return read_difficulty(file, run.size)
        assert run.proxy is not None
        losses: list[np.ndarray] = []
        margins: list[np.ndarray] = []
        for helper in range(self.helpers):
            split = half_split(run.size, FIRST_SEED + helper // 2)
            first = helper % 2 == 0
            train_ids = split.first_train if first else split.second_train
            score_ids = split.first_eval if first else split.second_eval
            values = run.proxy(
                train_ids,
                score_ids,
                _margin,
                evaluations=self.evaluations,
                epochs=self.helper_epochs,
                learning_rate=self.helper_learning_rate,
                lora=self.helper_lora,
                seed=FIRST_SEED + helper // 2,
                description=f"Helper model {helper + 1}/{self.helpers}, evaluation",
            )
            column = np.full((self.evaluations, run.size), np.nan, dtype=np.float32)
            loss = column.copy()
            column[:, score_ids], loss[:, score_ids] = values, np.logaddexp(0.0, -values)
            margins.append(column)
            losses.append(loss)
        difficulty = _mean_known(np.concatenate(losses))
        steps = _mean_known(np.stack([_learned_steps(column) for column in margins]))
        run.ledger.write(self.LEARNED_STEP, None, steps, step=0)
        if run.passes is None or run.passes.rank == 0:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_difficulty(file, difficulty, steps)
        return difficulty

    def _fingerprint(self, run: Run) -> str:
        arguments = run.arguments
        parts = {
            "dataset": dataset_fingerprint(run.dataset),
            "model": getattr(run.model.config, "_name_or_path", ""),
            "parameters": {k: v for k, v in self.describe().items() if k.startswith("helper") or k == "evaluations"},
            "training": [arguments.beta, arguments.learning_rate, arguments.max_length, list(arguments.loss_type)],
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    # ---- Online: pairs the run has not trained on yet are held out by construction. ----

    def _interval(self, run: Run) -> int:
        return max(1, round(run.max_steps / max(run.epochs, 1) / self.refreshes))

    def due(self, run: Run) -> bool:
        return self.source == "online" and run.epoch == 0 and run.step % self._interval(run) == 0

    def observe(self, run: Run, step: Step) -> None:
        if not self.due(run):
            return
        assert run.passes is not None
        unseen = np.flatnonzero(run.ledger.visits == 0)
        size = self.pool or 8 * self._interval(run) * len(step.ids)
        if len(unseen) > size:
            unseen = np.sort(run.rng(run.step).choice(unseen, size, replace=False))
        if not len(unseen):
            return
        margins = run.passes.measure(_margin, unseen, description="Scoring unseen pairs")
        # Before the policy has moved every loss is log 2: that says nothing of difficulty.
        if np.nanstd(margins) <= 1e-6:
            return
        losses = np.logaddexp(0.0, -margins)
        known = known_scores(run, self.name)[unseen]
        counts = self._counts[unseen]
        mean = np.where(counts > 0, (-known * counts + losses) / (counts + 1), losses)
        good = np.isfinite(mean)
        self._counts[unseen[good]] += 1
        run.ledger.write(self.name, unseen[good], -mean[good], run.step)

    # ---- Choice and order ----

    def _scores(self, run: Run) -> np.ndarray:
        return with_unseen(known_scores(run, self.name), run.rng(run.epoch, run.plans_made, 1))

    def select(self, run: Run) -> np.ndarray:
        return keep_top(self._scores(run), self.keep)

    def order(self, run: Run, ids: np.ndarray) -> np.ndarray:
        rng, scores = run.plan_rng(), self._scores(run)
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


def _mean_known(values: np.ndarray) -> np.ndarray:
    """Mean over axis 0 of the finite entries; NaN where there is none."""
    known = np.isfinite(values)
    total = np.where(known, values, 0.0).sum(axis=0)
    return np.where(known.any(axis=0), total / np.maximum(known.sum(axis=0), 1), np.nan)


def _learned_steps(margins: np.ndarray) -> np.ndarray:
    """Learned step of each held-out pair over the evaluations of one helper, NaN for the pairs it trained on."""
    scored = np.isfinite(margins).any(axis=0)
    steps = np.full(margins.shape[1], np.nan)
    steps[scored] = learned_step(margins[:, scored].T)
    return steps


def write_difficulty(path: str | os.PathLike, difficulty: np.ndarray, learned_steps: np.ndarray | None = None) -> None:
    """Writes the table id -> difficulty (larger = harder) as JSON or, by its name, CSV."""
    path = Path(path)
    ids = np.flatnonzero(np.isfinite(difficulty))
    columns = {"id": ids.tolist(), "learning_order": difficulty[ids].tolist()}
    if learned_steps is not None:
        columns["learned_step"] = learned_steps[ids].tolist()
    if path.suffix != ".csv":
        write_json(path, columns)
        return
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt_id", *list(columns)[1:]])
        writer.writerows(zip(*columns.values(), strict=True))
    os.replace(temporary, path)


def read_difficulty(path: str | os.PathLike, size: int) -> np.ndarray:
    """
    Reads a table id -> difficulty: JSON columns `id` and `learning_order`, or a CSV with `prompt_id` or `id`.

    Returns:
        `np.ndarray` of shape `(size,)`, NaN where the table has no entry.

    Raises:
        `ValueError`: if the file cannot be read so, or an id is no row of the dataset.
    """
    return _read_table(Path(path), size, "learning_order")


def _read_table(path: Path, size: int, column: str) -> np.ndarray:
    try:
        if path.suffix == ".csv":
            with path.open(newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
            key = "prompt_id" if rows and "prompt_id" in rows[0] else "id"
            ids = np.array([int(row[key]) for row in rows], dtype=np.int64)
            values = np.array([float(row[column] or "nan") for row in rows])
        else:
            table = json.loads(path.read_text(encoding="utf-8"))
            ids, values = np.array(table["id"], dtype=np.int64), np.array(table[column], dtype=np.float64)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not a difficulty table with the columns id and {column} ({type(error).__name__}: {error})."
        ) from error
    if len(ids) and (ids.min() < 0 or ids.max() >= size):
        raise ValueError(f"{path} names the pair {ids.max()}, but the dataset has {size} rows.")
    result = np.full(size, np.nan)
    result[ids] = values
    return result
