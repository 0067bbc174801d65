"""What methods that look at one vector per example share: where it comes from, and its checks."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from ..core.charges import Charge
from ..core.parameters import REFRESHES, Reads, when
from ..core.run import Run
from ..data.rows import Rows
from ..scorers.embeddings import SOURCE_HELP, check_embeddings, check_source, contents, embeddings
from ..signals.batch import Signal
from .offline import Prescored
from .target import Targeted


@dataclass
class Embedded(Prescored):
    """
    A method that chooses by an embedding of each example.

    Its `measure(run)` takes the embeddings from `vectors(run)`; `refresh` asks the policy for them again.
    """

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
    reads: ClassVar[Reads] = {"pooling": (when("embedding", "policy"),)}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_source(self.embedding, self.pooling, self.refresh)

    def check(self, run: Run) -> None:
        super().check(run)
        check_embeddings(run, self.embedding)

    def depends_on(self, run: Run) -> list[Any]:
        return [contents(run.rows, self.embedding)]

    @property
    def uses(self) -> tuple[str, ...]:
        return ("policy", "seed") if self.embedding == "policy" else ("seed",)

    def vectors(self, run: Run) -> np.ndarray:
        """One vector per example, `(N, d)` float32; once training has begun, those of the policy as it is."""
        return embeddings(run, self.embedding, self.pooling, live=run.step > 0)


@dataclass
class EmbeddedTarget(Targeted, Embedded):
    """A method that compares the embeddings of the examples with those of a target."""

    criterion = "external_continuous"
    charges: ClassVar[tuple[Charge, ...]] = (
        *Embedded.charges,
        Charge("forwards", per="target example and measurement", when="embedding: policy"),
        Charge("scorer_forwards", per="target example", when="embedding: model"),
    )

    def check(self, run: Run) -> None:
        super().check(run)
        for rows in self.followed(run):
            check_embeddings(run, self.embedding, rows)

    def followed(self, run: Run) -> list[Rows]:
        """The sets that are embedded beside the training set."""
        return [self.target_rows(run)]

    def units(self, run: Run) -> dict[str, float]:
        units, count = super().units(run), sum(map(len, self.followed(run)))
        measurements = units["example and measurement"] / run.size
        return {**units, "target example": count, "target example and measurement": count * measurements}

    def depends_on(self, run: Run) -> list[Any]:
        own = [[rows.fingerprint(), contents(rows, self.embedding)] for rows in self.followed(run)]
        return [*super().depends_on(run), own]

    def vectors_of(self, run: Run, rows: Rows) -> np.ndarray:
        """One vector per row of another set, `(M, d)` float32, of the same space as `vectors`."""
        return embeddings(run, self.embedding, self.pooling, rows=rows, live=run.step > 0)
