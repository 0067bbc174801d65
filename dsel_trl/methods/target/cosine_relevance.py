"""Cosine relevance: the examples that lie nearest to a target."""

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from ...bases.embedded import EmbeddedTarget
from ...core.method import Run
from ...core.parameters import check_choice
from ...core.registry import register
from ...functional.target.cosine_relevance import OVER, cosine_relevance


@register("cosine_relevance")
@dataclass
class CosineRelevance(EmbeddedTarget):
    """
    Ranks the examples by the cosine of their embeddings to those of a target.

    What: the mean of an example's cosines to the target's examples, or with `over: max` that to the nearest (the
    baseline RDS of hf.co/papers/2402.04333). The plain rule that other ways of following a target must beat.
    When: a target of one kind. When not: a target of several kinds, whose mean is none of them (`over: max`); near
    duplicates of what is wanted are all taken.
    Plan of 100,000 vectors of 64: 0.02 s on a core.
    """

    keep: float | None = field(default=None, metadata={"help": "fraction to keep, in (0, 1]; default 0.5"})
    over: str = field(default="mean", metadata={"help": f"the target's examples: one of {', '.join(OVER)}"})
    pooling: str = field(default="mean", metadata={"help": 'policy: "last" token or "mean" of all tokens'})

    paper = "hf.co/papers/2402.04333"
    selector = "top_k"
    actions: ClassVar[tuple[str, ...]] = ("keep_top", "weight", "curriculum", "sample", "band")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("over", self.over, OVER)

    def measure(self, run: Run) -> dict[str, np.ndarray]:
        vectors, target = self.vectors(run), self.vectors_of(run, self.target_rows(run))
        return {self.name: run.passes.from_first(run.size, lambda: cosine_relevance(vectors, target, self.over))}
