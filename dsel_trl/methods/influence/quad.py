"""Quad: clusters of examples as the arms of a bandit, whose rewards are influences on a target."""

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from ...bases.influence import LAYERS, FollowsGradient, gathered, sharded_like
from ...core.charges import Charge
from ...core.method import Run
from ...core.parameters import Reads, check_choice, check_range, check_refresh, check_whole, when
from ...core.registry import register
from ...core.run import Step
from ...functional.bandits import draw_in_rounds, pull
from ...functional.kmeans import BACKENDS, require_backend, spherical_kmeans
from ...functional.ranking import keep_count
from ...functional.running import Moments, moments_update
from ...scorers.embeddings import SOURCE_HELP, check_embeddings, check_source, embeddings
from ...scorers.kfac import SOLVERS, Kfac
from ...signals.batch import Batch, Signal
from ...signals.ghost import ExampleGradients, GradientRequest

# Clusters that so many steps can still come to know.
MOST_CLUSTERS = 256
# Influences that weigh in what is the usual one; the model that older ones were of has gone.
MEMORY = 1024


@register("quad")
@dataclass
class Quad(FollowsGradient):
    """
    Learns during the run which clusters of the data help a target, and feeds the next batches from these.

    What: examples are clustered by embeddings, once; clusters are arms of a bandit (hf.co/papers/2409.16986). The
    influence of a trained example, its gradient times that of the target by the inverse Hessian of the attention's
    projections (K-FAC), comes out of the ordinary backward pass. A cluster's reward in a step is the mean of its
    examples, in units of the spread of the last thousand; new rewards replace old ones by `discount`. Every `refresh`
    steps the order is made anew: the best `arms` clusters by their rewards and by how little is known of them, `draws`
    examples of each, and so on. An epoch serves the share `keep`; what is not drawn is never scored.
    Other than in the paper the run itself is what draws: examples are trained whatever their own influence turns out
    to be, and no threshold must be set.
    When: a large pool of many kinds, a small target, and no means to score everything.
    When not: runs of fewer steps than there are clusters, which only look around; data without kinds.
    A model that FSDP or DeepSpeed shards does not embed: give `embedding` as a column, a file or another model there.
    Memory: the target's gradient, and at each `target_refresh` the factors, `d_in^2 + d_out^2` numbers per attention
    (query, key and value together) and output projection. Lag: what is fetched ahead is trained first.
    """

    keep: float = field(default=0.5, metadata={"help": "share of the examples that an epoch serves, in (0, 1]"})
    refresh: int | str = field(
        default=10, metadata={"help": "optimizer steps after which the clusters are chosen anew"}
    )
    layers: str | Sequence[str] = field(default="attention", metadata={"help": LAYERS})
    target_refresh: int = field(
        default=200, metadata={"help": "optimizer steps for which one gradient of the target and its factors serve"}
    )
    precondition: str = field(
        default="kfac",
        metadata={"help": "kfac: by the inverse Hessian; adam: by the run's own second moments; none: plain products"},
    )
    calibration: int = field(default=256, metadata={"help": "training examples whose gradients make the factors"})
    damping: float = field(default=0.1, metadata={"help": "damping as a share of the mean eigenvalue of each layer"})
    solver: str = field(default="exact", metadata={"help": "exact, or factored: cheaper for wide layers"})
    arms: int = field(default=4, metadata={"help": "clusters drawn from at a time"})
    draws: int = field(default=16, metadata={"help": "examples drawn of each of them"})
    alpha: float = field(default=1.0, metadata={"help": "how much a cluster counts of which little is known"})
    discount: float = field(default=0.2, metadata={"help": "weight of a new reward in a cluster's mean; 0: a mean"})
    clusters: int | None = field(
        default=None,
        metadata={"help": f"number; default the root of the examples, at most {MOST_CLUSTERS}"},
    )
    embedding: str = field(default="policy", metadata={"help": SOURCE_HELP})
    pooling: str = field(default="mean", metadata={"help": 'policy: "last" token or "mean" of all tokens'})
    backend: str = field(default="sklearn", metadata={"help": '"sklearn" or "faiss" (extra `cluster`)'})

    signals = (Signal.INFLUENCE, Signal.EMBEDDING)
    paper = "hf.co/papers/2409.16986"
    family = "reduction"
    criterion = "external_continuous"
    selector = "bandit over clusters"
    charges = (
        Charge("forwards", when="embedding: policy"),
        Charge("scorer_forwards", when="embedding: model"),
        Charge("gradients", per="target example and refresh", reference=True),
        Charge("gradients", per="calibration example and refresh", when="precondition: kfac", reference=True),
    )
    state = "its score column, a cluster per example (4 bytes), and the target's gradient between two refreshes"
    preconditions = ("kfac", "adam", "none")
    reads: ClassVar[Reads] = {
        "calibration": (when("precondition", "kfac"),),
        "damping": (when("precondition", "kfac"),),
        "solver": (when("precondition", "kfac"),),
        "pooling": (when("embedding", "policy"),),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("keep", self.keep, 0, 1, open_low=True)
        check_refresh(self.refresh)
        check_whole("calibration", self.calibration, 1)
        check_range("damping", self.damping, 0, math.inf, open_low=True, open_high=True)
        check_choice("solver", self.solver, SOLVERS)
        check_whole("arms", self.arms, 1)
        check_whole("draws", self.draws, 1)
        check_range("alpha", self.alpha, 0, math.inf, open_high=True)
        check_range("discount", self.discount, 0, 1)
        if self.clusters is not None:
            check_whole("clusters", self.clusters, 1, 2**24)
        check_source(self.embedding, self.pooling)
        check_choice("backend", self.backend, tuple(BACKENDS))
        # Cluster of each example, -1 where its embedding is not known; empty until training begins.
        self._labels = np.empty(0, dtype=np.int32)
        self._pulls = np.empty(0, dtype=np.int64)
        self._means = np.empty(0)
        self._moments = Moments()

    def check(self, run: Run) -> None:
        if run.size == 0:
            raise ValueError(f"{self.name!r} clusters all examples before training, which a stream does not allow.")
        super().check(run)
        require_backend(self.backend)
        check_embeddings(run, self.embedding)
        if self.precondition == "kfac":
            Kfac(run.gradients.recorder.layers(self.layers))

    def units(self, run: Run) -> dict[str, float]:
        found = super().units(run)
        refreshes = -(-run.max_steps // self.target_refresh)
        return {**found, "calibration example and refresh": min(self.calibration, run.size) * refreshes}

    def setup(self, run: Run) -> None:
        run.ledger.add(self.name)

    def begin(self, run: Run) -> None:
        if len(self._labels):
            return
        vectors = embeddings(run, self.embedding, self.pooling, live=run.step > 0)
        self._labels = run.passes.from_first(run.size, lambda: self._clustered(run, vectors)).astype(np.int32)
        arms = int(self._labels.max()) + 1
        self._pulls, self._means = np.zeros(arms, dtype=np.int64), np.zeros(arms)

    def _clustered(self, run: Run, vectors: np.ndarray) -> np.ndarray:
        known = np.flatnonzero(np.isfinite(vectors).all(axis=1))
        if not len(known):
            raise ValueError(f"embedding={self.embedding!r} gives no example a vector that could be clustered.")
        count = self.clusters or min(MOST_CLUSTERS, math.ceil(math.sqrt(len(known))))
        seed = run.stream_seed(f"{self.name}/clusters")
        labels = np.full(run.size, -1, dtype=np.int64)
        labels[known], _ = spherical_kmeans(vectors[known], count, seed=seed, backend=self.backend)
        return labels

    # ---- Which clusters come next ----

    def epoch_size(self, run: Run) -> int:
        return keep_count(self.keep, run.size)

    def order(self, run: Run, ids: np.ndarray) -> np.ndarray:
        arguments = run.arguments
        step = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * run.world
        # Twice what is served until the next plan, which is late by what is fetched ahead.
        limit = len(ids) if isinstance(self.refresh, str) else 2 * self.refresh * step
        how: dict[str, Any] = {"arms": self.arms, "draws": self.draws, "alpha": self.alpha, "limit": limit}
        rng = run.plan_rng(f"{self.name}/draw")
        return draw_in_rounds(ids, self._labels[ids], self._pulls, self._means, rng=rng, **how)

    # ---- What they have given ----

    def target_gradient(self, run: Run) -> dict[str, Tensor]:
        """The target's gradient, with `precondition: kfac` times the inverse Hessian of the training loss."""
        found = super().target_gradient(run)
        if self.precondition != "kfac":
            return found
        count = min(self.calibration, run.size)
        ids = np.sort(run.rng(f"{self.name}/calibration", run.step).choice(run.size, size=count, replace=False))
        factors = Kfac(run.gradients.recorder.layers(self.layers))
        factors.calibrate(run, ids, self.layers)
        whole = {name: gathered(value) for name, value in found.items()}
        solved = factors.solve(whole, self.damping, self.solver)
        return {name: sharded_like(solved[name], value) for name, value in found.items()}

    def gradients(self, run: Run) -> GradientRequest | None:
        direction = self.direction(run)
        return None if direction is None else GradientRequest(self.layers, directions={"target": direction})

    def after_backward(self, run: Run, batch: Batch, gradients: ExampleGradients) -> dict[str, Tensor]:
        return {self.name: gradients.dot("target")}

    def observe(self, run: Run, step: Step) -> None:
        scores = step.values.get(self.name)
        if scores is None:
            return
        labels = self._labels[step.ids]
        known = np.isfinite(scores) & (labels >= 0)
        self._moments = moments_update(self._moments, scores[known], MEMORY)
        rewards = self._moments.standardised(scores[known])
        arms, place = np.unique(labels[known], return_inverse=True)
        means = np.bincount(place, rewards, len(arms)) / np.bincount(place, minlength=len(arms))
        self._pulls, self._means = pull(self._pulls, self._means, arms, means, self.discount)
        run.log({f"{self.name}_clusters_drawn": float((self._pulls > 0).mean())})

    # ---- Checkpoints ----

    def state_dict(self) -> dict[str, Any]:
        own = {"labels": self._labels, "pulls": self._pulls, "means": self._means}
        return {**super().state_dict(), **own, "moments": list(astuple(self._moments))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._labels, self._pulls, self._means = (state[key] for key in ("labels", "pulls", "means"))
        self._moments = Moments(*state["moments"])
