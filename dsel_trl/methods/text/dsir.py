"""DSIR: the examples whose words look like those of a target."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, cast

import numpy as np
from datasets import Dataset, DatasetDict

from ...bases.offline import Prescored
from ...bases.target import Targeted
from ...core.method import Run
from ...core.parameters import Reads, check_range, check_whole, given, when
from ...core.registry import register
from ...data.columns import plain_column
from ...data.conversations import example_texts, text_columns
from ...data.loading import take_split
from ...functional.ranking import keep_count
from ...functional.text.dsir import bucket_distribution, dsir_select, hash_ngrams, log_importance_weights
from ...signals.batch import Signal


@register("dsir")
@dataclass
class Dsir(Targeted, Prescored):
    """
    Resamples the data so that its words and word pairs look like those of target texts.

    What: hashed uni- and bigrams give each example a log importance weight, how much likelier it is in the target than
    in the data; the share `keep` is drawn without replacement in proportion to the weights (hf.co/papers/2302.03169).
    `action: keep_top` takes the largest weights instead; `refresh: epoch` draws anew each epoch, `never` once. The
    target is a set of examples, or of bare texts (`target`: a .txt file with one per line, or a column `text`), or the
    rows that `target_column` marks. Of a pair, prompt and chosen response count.
    When: a general pool and a clear target domain. When not: a handful of target texts; the weight is a sum over
    n-grams, so long texts have extreme weights (`min_words`, or bring lengths close first).
    Plan of 1,000,000 texts of 8 to 60 words: 150 s on a core and 1.6 GB.
    """

    action: str = field(default="sample", metadata={"help": "sample (draw by weight), keep_top (largest), curriculum"})
    keep: float | None = field(default=0.5, metadata={"help": "fraction to keep, in (0, 1]"})
    refresh: int | str = field(
        default="epoch", metadata={"help": 'sample: "epoch" draws anew each epoch, "never" once'}
    )
    target_column: str | None = field(
        default=None, metadata={"help": "instead: rows where this column exceeds target_above"}
    )
    target_above: float = field(default=0.0, metadata={"help": "value of target_column above which a row is target"})
    buckets: int = field(default=10_000, metadata={"help": "hash buckets of the n-grams"})
    ngrams: int = field(default=2, metadata={"help": "longest n-gram, in words"})
    smoothing: float = field(default=0.0, metadata={"help": "added to the target's counts"})
    min_words: int = field(default=0, metadata={"help": "shorter examples are dropped (100 in the paper's code)"})

    signals = (Signal.TEXT,)
    trainers = ("dpo", "sft", "kto")
    paper = "hf.co/papers/2302.03169"
    reads: ClassVar[Reads] = {
        "target_above": (given("target_column"),),
        "target_size": (given("target"),),
        "temperature": (when("action", "sample"),),
        "reverse": (when("action", "curriculum"),),
        "refresh": (when("action", "sample"),),
    }
    family = "indicator"
    renamed: ClassVar[dict[str, str]] = {"target_file": "target"}
    criterion = "external_continuous"
    selector = "gumbel_top_k"
    cost = "no GPU; 150 CPU seconds per 1,000,000 short texts"
    state = "its score column (8 bytes per example)"
    refreshes = ("epoch", "never")
    actions: ClassVar[tuple[str, ...]] = ("sample", "keep_top", "curriculum")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, low in (("buckets", 1), ("ngrams", 1), ("min_words", 0)):
            check_whole(name, getattr(self, name), low)
        check_range("smoothing", self.smoothing, 0, float("inf"))

    def check_target(self, instead: tuple[str, ...] = ()) -> None:
        super().check_target(("target_column", *instead))
        if self._is_text_file and not Path(self.target).is_file():
            raise ValueError(f"target={self.target!r}: there is no such file.")

    @property
    def _is_text_file(self) -> bool:
        return isinstance(self.target, str | Path) and Path(self.target).suffix == ".txt"

    @property
    def columns(self) -> tuple[str, ...]:
        return () if self.target_column is None else (self.target_column,)

    @property
    def hooks(self) -> frozenset[str]:
        # The draw is a choice here; an order would be drawn anew by the shared action.
        return super().hooks - ({"order"} if self.action == "sample" else set())

    @property
    def keep_share(self) -> float:
        return 1.0 if self.keep is None else self.keep

    def check(self, run: Run) -> None:
        super().check(run)
        text_columns(run.rows)
        if not self._targets(run):
            raise ValueError(f"The target is empty: target_column={self.target_column!r} marks no example.")

    def load_target(self, run: Run) -> Dataset:
        if not self._is_text_file:
            return super().load_target(run)
        lines = [line for line in Path(self.target).read_text(encoding="utf-8").splitlines() if line.strip()]
        splits = DatasetDict(train=Dataset.from_dict({"text": lines}))
        return cast(Dataset, take_split(splits, self.target_split, str(self.target), "target_split"))

    def read_target(self, run: Run) -> list[str]:
        dataset = self.target_dataset(run)
        if "text" in dataset.column_names:
            return [str(text) for text in plain_column(dataset, "text")]
        return example_texts(self.target_rows(run).side("chosen"))

    def _targets(self, run: Run, texts: list[str] | None = None) -> list[str]:
        if self.target is not None:
            return self.read_target(run)
        assert self.target_column is not None
        marked = np.flatnonzero(run.column(self.target_column) > self.target_above)
        return [str(i) for i in marked] if texts is None else [texts[i] for i in marked]

    @property
    def uses(self) -> tuple[str, ...]:
        return ()

    def renew(self, run: Run) -> None:
        """The weights stay what they are: what `refresh` makes anew is the draw."""

    def measure(self, run: Run) -> dict[str, np.ndarray]:
        return {self.name: run.passes.from_first(run.size, lambda: self._log_weights(run))}

    def _log_weights(self, run: Run) -> np.ndarray:
        texts = example_texts(run.rows.side("chosen"))
        hashed = hash_ngrams(texts, num_buckets=self.buckets, ngrams=self.ngrams)
        target = hash_ngrams(self._targets(run, texts), num_buckets=self.buckets, ngrams=self.ngrams)
        weights = log_importance_weights(
            hashed,
            bucket_distribution(hashed, self.buckets),
            bucket_distribution(target, self.buckets, smoothing=self.smoothing),
        )
        return np.where(hashed.num_words >= self.min_words, weights, -np.inf)

    def chosen(self, run: Run, scores: np.ndarray) -> np.ndarray:
        if self.action != "sample":
            return super().chosen(run, scores)
        count = keep_count(self.keep_share, int(np.isfinite(scores).sum()))
        draw = run.rng("dsir/sample", 0 if self.refresh == "never" else run.epoch)
        return dsir_select(scores / self.temperature, count, rng=draw)
