"""KNN-Shapley: what an example is worth to its nearest examples of a target."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from ...bases.embedded import EmbeddedTarget
from ...core.method import Run
from ...core.parameters import check_choice, check_whole
from ...core.registry import register
from ...data.columns import check_column, text_codes
from ...functional.kmeans import unit_rows
from ...functional.sinkhorn import METRICS
from ...functional.target.knn_shapley import knn_shapley


@register("knn_shapley")
@dataclass
class KnnShapley(EmbeddedTarget):
    """
    Ranks the examples by their Shapley value for a nearest-neighbour rule on a target.

    What: a target example is served well by a set whose `neighbours` nearest examples match it: in `label_column`,
    which both sets have, or, without it, by the cosine of their embeddings. The Shapley value of each example in that
    game has a closed form (hf.co/papers/1908.08619); the mean over the target is its score. A value below zero says
    that the example stands near a target example with another label.
    When: labels that may be wrong, or sources of which some serve the target. When not: with equal labels everywhere
    there is nothing to tell; without labels it ranks much as the similarity to the target does.
    Plan of 100,000 vectors of 64 for 100 targets: 1.7 s on a core and 0.1 GB, of 1,000,000 23 s and 0.6 GB; the time
    grows with the number of targets.
    """

    keep: float | None = field(default=None, metadata={"help": "fraction to keep, in (0, 1]; default 0.5"})
    neighbours: int = field(default=10, metadata={"help": "nearest examples that answer for a target example"})
    label_column: str | None = field(
        default=None,
        metadata={"help": "column of texts or whole numbers, in data and target, that must match"},
    )
    metric: str = field(default="cosine", metadata={"help": f"distance: one of {', '.join(METRICS)}"})
    pooling: str = field(default="mean", metadata={"help": 'policy: "last" token or "mean" of all tokens'})

    paper = "hf.co/papers/1908.08619"
    selector = "top_k"
    cost = "1.7 CPU seconds per 100,000 examples and 100 targets"
    actions: ClassVar[tuple[str, ...]] = ("keep_top", "weight", "curriculum", "sample", "band")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("neighbours", self.neighbours, 1)
        check_choice("metric", self.metric, METRICS)

    def check(self, run: Run) -> None:
        super().check(run)
        if self.label_column is None:
            return
        for rows in (run.rows, self.target_rows(run)):
            check_column(rows.dataset, self.label_column, f"label_column={self.label_column!r} of {rows.name!r}")
        own, theirs = self._labels(run)
        if not np.isin(theirs, own).any():
            raise ValueError(f"label_column={self.label_column!r}: the target shares no label with the data.")

    def _labels(self, run: Run) -> tuple[np.ndarray, np.ndarray]:
        """The labels of the data and of the target, as texts."""
        assert self.label_column is not None
        found = []
        for rows in (run.rows, self.target_rows(run)):
            names, codes = text_codes(rows.dataset, self.label_column)
            found.append(np.array(names)[codes])
        return found[0], found[1]

    def depends_on(self, run: Run) -> list[Any]:
        labels = None if self.label_column is None else [values.tolist() for values in self._labels(run)]
        return [*super().depends_on(run), labels]

    def measure(self, run: Run) -> dict[str, np.ndarray]:
        vectors, target = self.vectors(run), self.vectors_of(run, self.target_rows(run))
        return {self.name: run.passes.from_first(run.size, lambda: self._values(run, vectors, target))}

    def _values(self, run: Run, vectors: np.ndarray, target: np.ndarray) -> np.ndarray:
        if self.label_column is not None:
            own, theirs = self._labels(run)
            return knn_shapley(vectors, target, lambda i: own == theirs[i], self.neighbours, metric=self.metric)
        rows, goal = unit_rows(vectors), unit_rows(target)
        return knn_shapley(
            vectors, target, lambda i: np.maximum(rows @ goal[i], 0.0), self.neighbours, metric=self.metric
        )
