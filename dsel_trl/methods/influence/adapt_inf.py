"""Adapt-infinity: a pool that grows with each stage, and what of it is worth training on."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ...core.charges import Charge
from ...core.method import Method, Run
from ...core.parameters import Reads, check_choice, check_range, check_refresh, check_whole, when, without
from ...core.registry import register
from ...data.tokens import Sequences
from ...functional.influence.adapt_inf import (
    choose_in_clusters,
    most_entropic,
    similarity_in_clusters,
    without_duplicates,
)
from ...functional.influence.el2n import token_el2n
from ...functional.kmeans import BACKENDS, require_backend, spherical_kmeans
from ...functional.ranking import keep_count
from ...scorers.embeddings import policy_states
from ...scorers.gradient_features import block_layers, gradient_features
from ...scorers.zero_order import block_parameters, zero_order_features
from ...signals.batch import Signal
from ...signals.sequence_batch import SequenceBatch

SCORERS = ("perplexity", "el2n", "entropy")
FEATURES = ("zero_order", "gradients")


@register("adapt_inf")
@dataclass
class AdaptInf(Method):
    """
    Gives every skill in a growing pool the same budget, and samples each by the scorer that tells most there.

    What: examples are clustered by gradient features into pseudo-skills; in each cluster the scorer with the most
    entropic distribution is taken out of `scorers` (mean loss, EL2N and entropy of the label tokens; of a pair those
    of the chosen response); every cluster gets the same share of the budget, as far as it has examples; and inside
    one, examples are sampled evenly over the range of its scores without the outliers (hf.co/papers/2410.10636).
    Features are derivatives along `directions` random directions, shared by all examples, of the trainable parameters
    of one decoder `block`: forwards only. (The authors draw other directions for each example, which says nothing of
    which examples are alike.) With `features: gradients` they are random projections of the gradients themselves, by
    the block's linear layers: one backward pass instead of `2 * directions` forwards.
    With `stages:` and `replay: all` the pool is what is left of the earlier stages and the new one's rows; at the end
    of a stage the pool is cut to `survive` examples, near duplicates first, by the model's own hidden states.
    When: datasets that come one after the other, under a fixed budget for each.
    When not: one balanced dataset, where a random choice is a strong control; budgets below some ten examples per
    cluster.
    Lag: chosen when training begins, or with `refresh: epoch` at each epoch. Not under DeepSpeed ZeRO-3.
    Memory: `4 * directions` bytes per example on each process. Choice out of 100,000 examples with 64 directions: 2 s
    on a core and 0.1 GB; the cut of as many to half of them, by states of 64 numbers, 4 s and 0.2 GB (it grows with
    the square of a cluster).
    """

    keep: float = field(default=0.5, metadata={"help": "share of the pool to train on, in (0, 1]"})
    budget: int | None = field(default=None, metadata={"help": "instead of keep: examples to train on"})
    clusters: int = field(default=10, metadata={"help": "pseudo-skills"})
    scorers: Sequence[str] = field(
        default=SCORERS, metadata={"help": f"out of {', '.join(SCORERS)}; between equals the first"}
    )
    features: str = field(
        default="zero_order", metadata={"help": "zero_order: by forwards alone; gradients: by one backward pass"}
    )
    directions: int = field(
        default=64, metadata={"help": "random directions of the features: 2 forwards each; of gradients a square"}
    )
    eps: float | None = field(
        default=None, metadata={"help": "step along a direction; default 1e-3, with bf16 or fp16 1e-2"}
    )
    block: int = field(default=-1, metadata={"help": "decoder block of the features; negative = from the last"})
    bins: int = field(default=50, metadata={"help": "stretches of a cluster's scores that are sampled evenly"})
    survive: int | None = field(
        default=None, metadata={"help": "examples left for later stages, near duplicates go first; default all"}
    )
    backend: str = field(default="sklearn", metadata={"help": '"sklearn" or "faiss" (extra `cluster`)'})
    refresh: str = field(default="never", metadata={"help": '"never": chosen once; "epoch": anew each epoch'})

    signals = (Signal.LOSS, Signal.LOG_SUM_SQ_PROBS, Signal.INFLUENCE, Signal.EMBEDDING)
    paper = "hf.co/papers/2410.10636"
    outputs = ("log_sum_sq_probs", "entropy")
    family = "reduction"
    selector = "per_cluster, sampled evenly over the scores"
    reads: ClassVar[Reads] = {"keep": (without("budget"),), "eps": (when("features", "zero_order"),)}
    charges = (
        Charge("forwards", "2 * directions + 1", per="example and measurement", when="features: zero_order"),
        Charge("forwards", per="example and measurement", when="features: gradients"),
        Charge("gradients", per="example and measurement", when="features: gradients", reference=True),
        Charge("forwards", when="survive", at_most=True),
    )
    state = "the cluster, the scores and the choice of each example (33 bytes)"

    def __post_init__(self) -> None:
        check_range("keep", self.keep, 0, 1, open_low=True)
        if self.budget is not None:
            check_whole("budget", self.budget, 1)
        check_whole("clusters", self.clusters, 1, 2**24)
        if not self.scorers or len(set(self.scorers)) < len(self.scorers):
            raise ValueError(f"scorers={self.scorers!r} must name at least one scorer, and each of them once.")
        for name in self.scorers:
            check_choice("scorers", name, SCORERS)
        check_choice("features", self.features, FEATURES)
        check_whole("directions", self.directions, 1, 65536)
        if self.features == "gradients" and round(self.directions**0.5) ** 2 != self.directions:
            raise ValueError(f"directions={self.directions!r} is no square, which features='gradients' needs.")
        if self.eps is not None:
            check_range("eps", self.eps, 0, 1, open_low=True)
        check_whole("block", self.block, -(2**15), 2**15)
        check_whole("bins", self.bins, 1, 2**24)
        if self.survive is not None:
            check_whole("survive", self.survive, 1)
        check_choice("backend", self.backend, tuple(BACKENDS))
        check_refresh(self.refresh, ("never", "epoch"))
        self._mask: np.ndarray | None = None
        self._chosen_in = 0

    def units(self, run: Run) -> dict[str, float]:
        times = int(np.ceil(run.epochs)) if self.refresh == "epoch" else 1
        return {**super().units(run), "example and measurement": run.size * max(1, times)}

    def check(self, run: Run) -> None:
        if run.size == 0:
            raise ValueError(f"{self.name!r} clusters all examples before training, which a stream does not allow.")
        require_backend(self.backend)
        if self.features == "gradients":
            block_layers(run, self.block)
        elif not run.sharded:
            block_parameters(run.model, self.block)
        Sequences(run.rows.side("chosen"))

    def _size(self, run: Run) -> int:
        return keep_count(self.keep, run.size) if self.budget is None else min(self.budget, run.size)

    def epoch_size(self, run: Run) -> int:
        return self._size(run)

    def setup(self, run: Run) -> None:
        if not run.resumed and not run.sharded:
            self._choose(run)

    def begin(self, run: Run) -> None:
        if self._mask is None:
            self._choose(run)

    def select(self, run: Run) -> np.ndarray:
        if self.refresh == "epoch" and run.epoch != self._chosen_in:
            self._choose(run)
        if self._mask is None:
            raise ValueError(
                f"{self.name!r} chooses when training begins where the model is sharded: no other method that keeps a "
                "part of the examples can go with it there."
            )
        return self._mask

    def _choose(self, run: Run) -> None:
        scores = self._scores(run)
        labels = self._clusters(run, np.isfinite(np.stack(list(scores.values()))).any(axis=0))
        clusters = int(labels.max()) + 1
        chosen, _ = most_entropic(scores, labels, clusters)
        rng = run.rng("adapt_inf/choice", run.epoch)
        self._mask, self._chosen_in = np.zeros(run.size, dtype=bool), run.epoch
        self._mask[choose_in_clusters(scores, chosen, labels, self._size(run), rng, self.bins)] = True
        run.ledger.write(self._column("cluster"), None, labels, run.step)
        for name, values in scores.items():
            run.ledger.write(self._column(name), None, values, run.step)
        # An example of no cluster has no score: all of its scores are unknown.
        deciding = np.array([scores[name] for name in chosen])[labels, np.arange(run.size)]
        deciding[labels < 0] = np.nan
        rule = "not drawn from its cluster, over the whole range of the score that spreads most there"
        run.ledger.decide(self.name, None, deciding, run.step, rule)
        run.log({f"adapt_inf_by_{name}": chosen.count(name) for name in self.scorers})

    def _column(self, name: str) -> str:
        return f"{self.name}_{name}"

    def _scores(self, run: Run) -> dict[str, np.ndarray]:
        """Scores of all examples by scorer, `(N,)`; NaN for an example without a label token."""
        sequences = Sequences(run.rows.side("chosen"))
        values = run.passes.measure(
            self._measured, inputs=sequences.collate(), lengths=sequences.scan()[0], description="Scores"
        )
        if not np.isfinite(values).any():
            raise ValueError(f"{self.name!r} found no example with a score: nothing can be chosen.")
        return {name: values[:, at].astype(np.float64) for at, name in enumerate(self.scorers)}

    def _measured(self, batch: SequenceBatch) -> Tensor:
        forward, width = batch.policy, batch.token_mask.shape[1]
        if forward.log_sum_sq_probs is None or forward.entropy is None:
            raise ValueError(f"{self.name!r} needs the entropy of each token, which this model does not give.")
        tokens = {
            "perplexity": -forward.log_probs[:, -width:].float(),
            "el2n": token_el2n(forward.log_probs[:, -width:], forward.log_sum_sq_probs[:, -width:]),
            "entropy": forward.entropy[:, -width:].float(),
        }
        means = torch.stack([batch.example_weights(tokens[name]) for name in self.scorers], dim=1)
        return torch.where((batch.lengths > 0)[:, None], means, torch.nan)

    def _clusters(self, run: Run, known: np.ndarray) -> np.ndarray:
        """Pseudo-skill of each example, `(N,)` int64; -1 for those of which nothing is known."""
        features = np.nan_to_num(self._features(run))

        def labels() -> np.ndarray:
            found = np.full(run.size, -1.0)
            seed = run.stream_seed("adapt_inf/clusters", run.epoch)
            found[known] = spherical_kmeans(features[known], self.clusters, seed=seed, backend=self.backend)[0]
            return found

        return run.passes.from_first(run.size, labels).astype(np.int64)

    def _features(self, run: Run) -> np.ndarray:
        if self.features == "gradients":
            return gradient_features(run, self.directions, self.block, self.name)
        half = bool(run.arguments.bf16 or run.arguments.fp16)
        eps = self.eps if self.eps is not None else (1e-2 if half else 1e-3)
        return zero_order_features(run, self.directions, eps, self.block, self.name)

    def survivors(self, run: Run) -> np.ndarray | None:
        if self.survive is None:
            return None
        labels = run.ledger[self._column("cluster")].astype(np.int64)
        states = np.nan_to_num(policy_states(run, "mean", layer=-2))
        similarity = run.passes.from_first(run.size, lambda: similarity_in_clusters(states, labels))
        mask = np.zeros(run.size, dtype=bool)
        mask[without_duplicates(similarity, labels, self.survive)] = True
        return mask

    def state_dict(self) -> dict[str, Any]:
        return {"chosen_in": self._chosen_in, **({} if self._mask is None else {"mask": self._mask})}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._chosen_in = int(state["chosen_in"])
        self._mask = state["mask"].astype(bool) if "mask" in state else None
