"""What methods that choose by clusters of embeddings share: the vectors, the clusters, and their checks."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from ..core.charges import Charge
from ..core.parameters import REFRESHES, Reads, check_choice, check_whole, when
from ..core.run import Run
from ..functional.kmeans import BACKENDS, require_backend
from ..scorers.embeddings import SOURCE_HELP, check_embeddings, check_source, contents, embeddings
from ..signals.batch import Signal
from .offline import Prescored


@dataclass
class Clustered(Prescored):
    """
    A method that clusters an embedding of each example and chooses within the clusters.

    Its `measure(run)` takes the embeddings from `vectors(run)`; `refresh` asks the policy for them again.
    """

    clusters: int | None = field(
        default=None, metadata={"help": "number of clusters; default the root of the examples"}
    )
    backend: str = field(default="sklearn", metadata={"help": '"sklearn" or "faiss" (extra `cluster`)'})
    embedding: str = field(default="policy", metadata={"help": SOURCE_HELP})
    pooling: str = field(default="last", metadata={"help": 'policy: "last" token or "mean" of all tokens'})

    signals = (Signal.EMBEDDING,)
    trainers = ("dpo", "sft", "kto")
    family = "reduction"
    criterion = "none"
    charges: ClassVar[tuple[Charge, ...]] = (
        Charge("forwards", per="example and measurement", when="embedding: policy"),
        Charge("scorer_forwards", when="embedding: model"),
    )
    refreshes = REFRESHES
    chooses = True
    reads: ClassVar[Reads] = {"pooling": (when("embedding", "policy"),)}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clusters is not None:
            check_whole("clusters", self.clusters, 1)
        check_choice("backend", self.backend, tuple(BACKENDS))
        check_source(self.embedding, self.pooling, self.refresh)

    def check(self, run: Run) -> None:
        super().check(run)
        require_backend(self.backend)
        check_embeddings(run, self.embedding)

    def depends_on(self, run: Run) -> list[Any]:
        return [contents(run, self.embedding)]

    @property
    def uses(self) -> tuple[str, ...]:
        return ("policy", "seed") if self.embedding == "policy" else ("seed",)

    def vectors(self, run: Run) -> np.ndarray:
        """One vector per example, `(N, d)` float32; once training has begun, those of the policy as it is."""
        return embeddings(run, self.embedding, self.pooling, live=run.step > 0)
