"""A budget spread over clusters of loss trajectories."""

from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, ClassVar

import numpy as np

from ...bases.helper_model import helper_settings
from ...core.cache import cached
from ...core.charges import Charge
from ...core.method import Method, Run
from ...core.parameters import Reads, check_range, check_whole, without
from ...core.registry import register
from ...data.columns import check_column, codes
from ...functional.loss.s2l import cluster_trajectories, loss_trajectories, s2l_select
from ...functional.ranking import keep_count
from ...signals.batch import Signal

# At which the authors train their helper whole.
LEARNING_RATE = 2e-5


@register("s2l")
@dataclass
class S2L(Method):
    """
    Keeps examples of every kind of learning behaviour: equal numbers from clusters of loss trajectories.

    What: a (small) helper model is trained on all data and measures every example's loss `checkpoints` times; the
    trajectories are clustered by k-means, and the budget is spread over the clusters from the smallest on, drawn at
    random within each (hf.co/papers/2403.07384). Clusters of two or fewer are used last. With `source_column` the
    budget is first spread over the data sources. The loss is that of the pair, or the mean per token for SFT. Chosen
    once; trajectories are kept under `output_dir/selection`. The helper is trained as the authors train theirs: all of
    its weights, for 3 epochs, at 2e-5; theirs is small (70 million parameters), the default here is the policy itself.
    When: large SFT sets with much redundancy; a small model of the same tokenizer at hand (`helper_model`).
    When not: it looks at diversity, not at quality: noise has clusters of its own, which get their share.
    """

    keep: float = field(default=0.3, metadata={"help": "share of the examples to keep, in (0, 1]"})
    clusters: int = field(default=100, metadata={"help": "clusters per data source"})
    checkpoints: int = field(default=10, metadata={"help": "measurements of each example's loss"})
    trajectory_column: str | None = field(
        default=None, metadata={"help": "list column with the losses of an earlier run, instead of a helper model"}
    )
    source_column: str | None = field(default=None, metadata={"help": "column that names each example's data source"})
    helper_model: str | None = field(
        default=None, metadata={"help": "another (smaller) model with the same tokenizer; default the policy as it is"}
    )
    helper_lora: bool = field(default=False, metadata={"help": "helper model: LoRA (r 16) or full fine-tuning"})
    helper_epochs: float = field(default=3.0, metadata={"help": "helper model: epochs"})
    helper_learning_rate: float | None = field(
        default=None, metadata={"help": "helper model: default 2e-5, or with LoRA 3e-4"}
    )
    seed: int = field(default=0, metadata={"help": "of the clustering and the draws, beside the run's seed"})

    signals = (Signal.LOSS,)
    paper = "hf.co/papers/2403.07384"
    reads: ClassVar[Reads] = {
        name: (without("trajectory_column"),)
        for name in ("checkpoints", "helper_model", "helper_lora", "helper_epochs", "helper_learning_rate")
    }
    family = "reduction"
    selector = "random, balanced over clusters"
    charges = (
        Charge("helper_trainings", "helper_epochs", when="no trajectory_column", reference=True),
        Charge("helper_forwards", "checkpoints", when="no trajectory_column", reference=True),
    )
    state = "the cluster and the choice of each example (9 bytes)"

    def __post_init__(self) -> None:
        check_range("keep", self.keep, 0, 1, open_low=True)
        check_whole("clusters", self.clusters, 1, 2**24)
        check_whole("checkpoints", self.checkpoints, 1, 10_000)
        check_whole("seed", self.seed, 0, 2**63)
        check_range("helper_epochs", self.helper_epochs, 0, 1000, open_low=True)
        self._mask: np.ndarray | None = None

    def check(self, run: Run) -> None:
        for name in (self.trajectory_column, self.source_column):
            if name is not None:
                check_column(run.dataset, name, "'s2l'")

    def setup(self, run: Run) -> None:
        if run.resumed:
            return
        rng = run.rng("s2l/choice", self.seed)
        losses = self._trajectories(run)
        trajectories = loss_trajectories(losses)
        # Without a single loss there is no trajectory, and nothing to be chosen by.
        known = np.isfinite(losses).any(axis=1)
        if not known.any():
            raise ValueError(f"{self.name!r} found no example with a loss: nothing can be clustered.")
        labels = np.full(run.size, -1, dtype=np.int64)
        sources = self._sources(run)
        for source in np.unique(sources[known]):
            members = np.flatnonzero(known & (sources == source))
            labels[members] = cluster_trajectories(trajectories[members], rng, self.clusters)
        budget = keep_count(self.keep, run.size)
        ids = np.flatnonzero(known)[s2l_select(labels[known], budget, rng, sources[known])]
        self._mask = np.zeros(run.size, dtype=bool)
        self._mask[ids] = True
        run.ledger.write(f"{self.name}_cluster", None, labels, step=0)
        rule = "not drawn from its cluster, whose number the score is; all clusters give about equally many"
        run.ledger.decide(self.name, None, labels, run.step, rule)

    def _trajectories(self, run: Run) -> np.ndarray:
        """Losses of all examples, `(N, T)`."""
        if self.trajectory_column is not None:
            rows = run.values(self.trajectory_column)
            widths = {len(row) for row in rows}
            if len(widths) != 1:
                raise ValueError(f"Column {self.trajectory_column!r} must hold equally many losses per row: {widths}.")
            return np.array(rows, dtype=np.float32)
        helper = helper_settings(self, run.stream_seed("s2l/helper"))
        if not self.helper_lora and self.helper_learning_rate is None:
            helper["learning_rate"] = LEARNING_RATE
        measure = lambda: {"losses": self._helper_losses(run, helper)}  # noqa: E731
        return cached(run, "loss-trajectories", [self.checkpoints], measure, uses=(), helpers=[helper])["losses"]

    def _helper_losses(self, run: Run, helper: dict[str, Any]) -> np.ndarray:
        everything = np.arange(run.size)
        values = run.train_helper(
            everything,
            everything,
            attrgetter("loss"),
            evaluations=self.checkpoints,
            description="Helper model, checkpoint",
            **helper,
        )
        return np.ascontiguousarray(values.T)

    def _sources(self, run: Run) -> np.ndarray:
        if self.source_column is None:
            return np.zeros(run.size, dtype=np.int64)
        return codes(run.dataset, self.source_column)

    def epoch_size(self, run: Run) -> int:
        return keep_count(self.keep, run.size)

    def select(self, run: Run) -> np.ndarray:
        assert self._mask is not None
        return self._mask

    def state_dict(self) -> dict[str, Any]:
        return {"mask": self._mask}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._mask = state["mask"].astype(bool)
