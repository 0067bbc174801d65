"""Data Shapley: the examples that are worth most to a target, by what they add to all sets of others."""

import logging
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ...bases.offline import Prescored
from ...bases.target import Targeted, content_of
from ...core.method import Run
from ...core.parameters import Reads, check_range, check_whole, given
from ...core.registry import register
from ...data.columns import check_column, text_codes
from ...data.conversations import example_messages, prompt_and_answer, text_columns
from ...data.responses import prompt_text, prompts_of, responses_of
from ...data.rows import Rows
from ...data.value_table import read_values
from ...functional.influence.linear_probe import ProbeGame
from ...scorers.probe_features import ProbeRows, pair_rows, response_rows, scaled
from ...scorers.shapley_values import ShapleySettings, shapley_values
from ...signals.batch import Signal


@register("data_shapley")
@dataclass
class DataShapley(Targeted, Prescored):
    """
    Keeps the examples of the highest Shapley values: what each adds, on average, to sets of the others.

    What: a set is worth what a linear probe on hashed words that is trained on it takes off the error on a `target`;
    the values are exact for up to 10 players, else the mean over truncated random orders
    (proceedings.mlr.press/v97/ghorbani19c.html). `group_column` values groups, and gives each row an equal part.
    `values` reads a table that `dsel value` has written, which takes more settings and embeddings. Before the first
    step a test says whether a selection by the values can be trusted: whether the worth of a set is a monotone
    function of a sum (hf.co/papers/2405.03875); if not, the run is warned.
    When: wrong labels, harmful sources; few groups are cheap and settle soon. When not: duplicates, which share a
    value and are kept together; where the test says no, `random` or a method for diversity does as well.
    Plan of 2,000 examples: 140 s on a core for 500 orders, 8 bytes per example and order; 10,000 in 5 groups: 1 s.
    """

    values: str | None = field(default=None, metadata={"help": "instead of a target: values.parquet of `dsel value`"})
    keep: float | None = field(default=None, metadata={"help": "fraction to keep, in (0, 1]; default 0.5"})
    group_column: str | None = field(
        default=None, metadata={"help": "column of texts or whole numbers: value its groups instead of examples"}
    )
    permutations: int = field(default=500, metadata={"help": "most orders that are walked"})
    features: int = field(default=64, metadata={"help": "numbers that stand for a text"})
    ridge: float = field(default=10.0, metadata={"help": "penalty of the probe, as strong as so many examples"})

    signals = (Signal.TEXT,)
    trainers = ("dpo", "sft")
    paper = "hf.co/papers/2405.03875"
    criterion = "external_continuous"
    selector = "top_k"
    cost = "no GPU; 140 CPU seconds per 2,000 examples and 500 orders"
    state = "its score column (8 bytes per example)"
    actions: ClassVar[tuple[str, ...]] = ("keep_top", "weight", "curriculum", "sample", "band")
    reads: ClassVar[Reads] = dict.fromkeys(
        ("target_size", "group_column", "permutations", "features", "ridge"), (given("target"),)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("permutations", self.permutations, 1)
        check_whole("features", self.features, 1, 4096)
        check_range("ridge", self.ridge, 0, float("inf"), open_low=True)

    def check_target(self, instead: tuple[str, ...] = ()) -> None:
        super().check_target(("values", *instead))

    @property
    def uses(self) -> tuple[str, ...]:
        return () if self.target is None else ("seed",)

    def check(self, run: Run) -> None:
        super().check(run)
        if self.values is not None:
            read_values(self.values, run.rows.positions)
            return
        text_columns(run.rows)
        if self.group_column is not None:
            check_column(run.rows.dataset, self.group_column, f"group_column={self.group_column!r}")

    def depends_on(self, run: Run) -> list[Any]:
        if self.values is not None:
            return [content_of(Path(self.values)), run.rows.positions.tolist()]
        groups = None if self.group_column is None else self._players(run).tolist()
        return [self.target_rows(run).fingerprint(), groups]

    def measure(self, run: Run) -> dict[str, np.ndarray]:
        if self.values is not None:
            return {self.name: read_values(self.values, run.rows.positions)}
        return {self.name: run.passes.from_first(run.size, lambda: self._found(run))}

    def _players(self, run: Run) -> np.ndarray:
        """The player of each row, from 0 without gaps."""
        if self.group_column is None:
            return np.arange(run.size)
        return text_codes(run.rows.dataset, self.group_column)[1]

    def _found(self, run: Run) -> np.ndarray:
        own, held = scaled(
            self._probed(run.rows), self._probed(self.target_rows(run)), paired=bool(run.rows.layout.sides)
        )
        players = self._players(run)
        game = ProbeGame(*own, *held, players, self.ridge)
        settings = ShapleySettings(permutations=self.permutations, keep=self.keep_share, seed=run.seed)
        work = Path(run.output_dir) / "selection" / "data_shapley"
        told = [run.rows.fingerprint(), self.depends_on(run), self.describe()]
        found = shapley_values(game, settings, work, repr(told))
        shutil.rmtree(work, ignore_errors=True)
        run.tell(
            f"{self.name}:trust",
            f"{self.name!r}: can a selection of {found.trust.size} of {len(game)} players by their values be trusted? "
            f"{found.trust}.",
            logging.INFO if found.trust.verdict else logging.WARNING,
        )
        return (found.values / game.sizes)[players]

    def _probed(self, rows: Rows) -> ProbeRows:
        if rows.layout.sides:
            prompts = [prompt_text(prompt) for prompt in prompts_of(rows.dataset)]
            chosen, rejected = (responses_of(rows.dataset, side, rows.end) for side in ("chosen", "rejected"))
            return pair_rows(prompts, chosen, rejected, self.features)
        turns = [prompt_and_answer(messages) for messages in example_messages(rows)]
        return response_rows([asked for asked, _ in turns], [answer for _, answer in turns], self.features)
