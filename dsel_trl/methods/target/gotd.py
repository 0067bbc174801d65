"""GOT-D: the examples that bring the data closest to a target."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from ...bases.embedded import EmbeddedTarget
from ...bases.target import check_set, content_of, drawn, load_set, prepared
from ...core.method import Run
from ...core.parameters import Reads, check_choice, check_whole, given
from ...core.registry import register
from ...data.columns import check_column, text_codes
from ...data.rows import Rows
from ...functional.sinkhorn import METRICS, require_exact
from ...functional.target.gotd import SOLVERS, target_gradient
from ...functional.target.relevance import most_relevant


@register("gotd")
@dataclass
class Gotd(EmbeddedTarget):
    """
    Takes the examples that move the data fastest towards a target: those it needs and the data lack.

    What: the optimal transport from the embeddings of the data to those of the target has a gradient by the mass of
    each example (hf.co/papers/2405.02774, LAVA's calibration); the most negative come first. With `negative`, a set to
    stay away from, those whose mass brings the data closer to it come last. `domain_column` first keeps the `domains`
    whose samples are nearest to the target. `action` keeps, weighs (`exp(score / temperature)`) or orders;
    `refresh` measures with the policy's embeddings of the moment.
    When: a general pool and some hundred examples of what the model is for. When not: near duplicates of what is
    wanted are all taken (drop them first); the target's examples must lie in the same embedding space. With
    `cosine` the scores are of the size of 0.1: a `temperature` near that acts as a weight.
    Plan of 100,000 vectors of 64 for 1,000 targets: 67 s on a core and 0.9 GB. On a GPU (H200) 1,000,000 vectors take
    2.4 s for 1,000 targets and 22 s for 10,000, with 0.8 GB of its memory: the costs are never held together.
    """

    action: str = field(default="keep_top", metadata={"help": "keep_top, weight, curriculum, sample, band"})
    keep: float | None = field(default=None, metadata={"help": "fraction to keep, in (0, 1]; default 0.5"})
    negative: Any = field(
        default=None,
        metadata={"help": "examples to stay away from, given as `target` is (`target_split` and `target_size` count)"},
    )
    metric: str = field(default="cosine", metadata={"help": f"ground cost: one of {', '.join(METRICS)}"})
    solver: str = field(default="sinkhorn", metadata={"help": '"sinkhorn", or "exact" for small sets (extra `ot`)'})
    domain_column: str | None = field(
        default=None, metadata={"help": "column of texts with each example's domain: the nearest ones are kept first"}
    )
    domains: int = field(default=2, metadata={"help": "domains that are kept"})
    domain_samples: int = field(default=10_000, metadata={"help": "examples of a domain that are compared"})
    pooling: str = field(default="mean", metadata={"help": 'policy: "last" token or "mean" of all tokens'})

    paper = "hf.co/papers/2405.02774"
    selector = "top_k"
    cost = "67 CPU seconds per 100,000 examples and 1,000 targets"
    reads: ClassVar[Reads] = {
        "domains": (given("domain_column"),),
        "domain_samples": (given("domain_column"),),
    }
    actions: ClassVar[tuple[str, ...]] = ("keep_top", "weight", "curriculum", "sample", "band")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._negative_rows: Rows | None = None
        if self.negative is not None:
            check_set("negative", self.negative)
        check_choice("metric", self.metric, METRICS)
        check_choice("solver", self.solver, SOLVERS)
        check_whole("domains", self.domains, 1)
        check_whole("domain_samples", self.domain_samples, 2)

    def check(self, run: Run) -> None:
        super().check(run)
        if self.solver == "exact":
            require_exact()
        if self.domain_column is not None:
            check_column(run.dataset, self.domain_column, f"domain_column={self.domain_column!r}")
            names, _ = text_codes(run.dataset, self.domain_column)
            if len(names) <= self.domains:
                raise ValueError(
                    f"domains={self.domains} of the {len(names)} in column {self.domain_column!r} leaves out none: "
                    "give fewer, or no domain_column."
                )

    def followed(self, run: Run) -> list[Rows]:
        if self.negative is None:
            return super().followed(run)
        if self._negative_rows is None:
            dataset = load_set(run, self.negative, self.target_split)
            dataset = drawn(run, "negative", self.negative, dataset, self.target_size)
            self._negative_rows = prepared(run, "negative", self.negative, dataset)
        return [*super().followed(run), self._negative_rows]

    def depends_on(self, run: Run) -> list[Any]:
        domains = None if self.domain_column is None else text_codes(run.dataset, self.domain_column)[1].tolist()
        return [*super().depends_on(run), domains]

    def describe(self) -> dict[str, Any]:
        described = super().describe()
        return described if self.negative is None else {**described, "negative_content": content_of(self.negative)}

    def measure(self, run: Run) -> dict[str, np.ndarray]:
        vectors = self.vectors(run)
        sets = [self.vectors_of(run, rows) for rows in self.followed(run)]
        return {self.name: run.passes.from_first(run.size, lambda: self._scores(run, vectors, *sets))}

    def _scores(
        self, run: Run, vectors: np.ndarray, target: np.ndarray, negative: np.ndarray | None = None
    ) -> np.ndarray:
        scores = np.full(run.size, -np.inf)
        ids = self._relevant(run, vectors, target)
        how: dict[str, Any] = {"solver": self.solver, "metric": self.metric, "device": run.model.device}
        scores[ids] = -target_gradient(vectors[ids], target, **how)
        if negative is not None:
            scores[ids] += target_gradient(vectors[ids], negative, **how)
        return scores

    def _relevant(self, run: Run, vectors: np.ndarray, target: np.ndarray) -> np.ndarray:
        """The examples of the domains that are nearest to the target."""
        if self.domain_column is None:
            return np.arange(run.size)
        names, codes = text_codes(run.dataset, self.domain_column)
        kept, distances = most_relevant(
            vectors,
            codes,
            target,
            self.domains,
            samples=self.domain_samples,
            metric=self.metric,
            rng=run.rng("gotd/domains", run.epoch),
        )
        run.log({f"gotd/distance/{name}": float(distance) for name, distance in zip(names, distances, strict=True)})
        return np.flatnonzero(np.isin(codes, kept))

    def weights(self, scores: np.ndarray) -> np.ndarray:
        # A softmax over the step: what all of them have in common falls out with their mean.
        return np.exp(np.clip(scores / self.temperature, -50, 50))
