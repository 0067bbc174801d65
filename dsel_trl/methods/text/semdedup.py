"""SemDeDup: one of each group of near duplicates."""

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from ...bases.clustered import Clustered
from ...core.method import Run
from ...core.parameters import Reads, check_choice, check_range, when
from ...core.registry import register
from ...functional.kmeans import spherical_kmeans, unit_rows
from ...functional.text.semdedup import KEEP, eps_for_fraction, max_similarity, rank_clusters, semdedup_keep


@register("semdedup")
@dataclass
class SemDedup(Clustered):
    """
    Drops examples that say nearly the same as another one.

    What: embeddings are clustered by direction; inside a cluster, an example whose cosine similarity to one before it
    exceeds `1 - eps` is dropped (hf.co/papers/2303.09540). `prefer` says which of two duplicates comes first: the one
    far from the centroid (`hard`), near it (`easy`), or a random one. Without `eps` it is set so that the share `keep`
    is left. `refresh` clusters the policy's embeddings of the moment again.
    When: scraped or generated data with paraphrases. When not: duplicates that fall into different clusters are not
    found; exact duplicates are found cheaper by a hash.
    Plan of 1,000,000 vectors of 64 in 1,000 clusters: 100 s on a core and 0.8 GB; it grows with the clusters' sizes
    squared.
    """

    keep: float | None = field(default=0.75, metadata={"help": "fraction to keep, in (0, 1]; eps is set to fit"})
    eps: float | None = field(default=None, metadata={"help": "instead of keep: drop above similarity 1 - eps"})
    prefer: str = field(default="hard", metadata={"help": f"one of {', '.join(KEEP)}"})
    pooling: str = field(default="mean", metadata={"help": 'policy: "last" token or "mean" of all tokens'})

    paper = "hf.co/papers/2303.09540"
    reads: ClassVar[Reads] = {
        "keep": (when("eps", None),),
    }
    selector = "per_cluster, threshold"
    cost = "100 CPU seconds per 1,000,000 examples"
    state = "two columns (16 bytes per example)"
    actions: ClassVar[tuple[str, ...]] = ("keep_top", "curriculum", "sample")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eps is not None:
            check_range("eps", self.eps, 0, 2)
        check_choice("prefer", self.prefer, KEEP)

    def measure(self, run: Run) -> dict[str, np.ndarray]:
        vectors = self.vectors(run)
        similarity = run.passes.from_first(run.size, lambda: self._similarity(run, vectors))
        eps = eps_for_fraction(similarity, self.keep or 1.0) if self.eps is None else self.eps
        scores = np.full(run.size, -np.inf)
        kept = semdedup_keep(similarity, eps)
        # Less similar to what comes before it = more of its own to say.
        scores[kept] = 1.0 - similarity[kept]
        return {"semdedup_similarity": similarity, self.name: scores}

    def _similarity(self, run: Run, vectors: np.ndarray) -> np.ndarray:
        rows = unit_rows(vectors)
        labels, centroids = spherical_kmeans(
            rows, self.clusters, seed=run.stream_seed("semdedup/clusters"), backend=self.backend
        )
        orders = rank_clusters(rows, labels, centroids, keep=self.prefer, rng=run.rng("semdedup/prefer", run.epoch))
        return max_similarity(orders, run.size)
