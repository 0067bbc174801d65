"""What methods that choose by clusters of embeddings share: the clusters and their checks."""

from dataclasses import dataclass, field

from ..core.parameters import check_choice, check_whole
from ..core.run import Run
from ..functional.kmeans import BACKENDS, require_backend
from .embedded import Embedded


@dataclass
class Clustered(Embedded):
    """A method that clusters an embedding of each example and chooses within the clusters."""

    clusters: int | None = field(
        default=None, metadata={"help": "number of clusters; default the root of the examples"}
    )
    backend: str = field(default="sklearn", metadata={"help": '"sklearn" or "faiss" (extra `cluster`)'})

    chooses = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clusters is not None:
            check_whole("clusters", self.clusters, 1)
        check_choice("backend", self.backend, tuple(BACKENDS))

    def check(self, run: Run) -> None:
        super().check(run)
        require_backend(self.backend)
