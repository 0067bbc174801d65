"""Pairs of which several margins agree that they are worth training on."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ...bases.explicit_margin import ExplicitMargin, score_reads
from ...bases.helper_model import helper_settings
from ...bases.scored import ByScore, known_scores, tell_ties, tie_rng, untied
from ...core.cache import cached
from ...core.charges import Charge
from ...core.method import Run, Step
from ...core.parameters import Reads, among, check_choice, check_range, check_whole, either, when
from ...core.registry import register
from ...functional.preference.bees import (
    EXTERNAL_DIVISOR,
    IMPLICIT_DIVISOR,
    fuse_margins,
    fuse_probabilities,
    margin_probability,
    select_fused,
    unclipped_evidence,
    upper_bound,
)
from ...signals.batch import Batch, Signal
from ...signals.pair_batch import PairBatch

OWN_SOURCES = ("explicit", "implicit", "helper")
FUSIONS = ("product", "add", "max", "min")


@register("bees")
@dataclass
class Bees(ExplicitMargin, ByScore):
    """
    Fuses several margins of a pair into one probability that it is worth training on, and keeps the top share.

    What: each source's margins are clamped to [M1, M2], where M2 cuts off the sparse right tail, and scaled to a
    probability p; the sources are fused by `prod p / (prod p + prod (1 - p))` (hf.co/papers/2502.14560). Sources:
    `explicit` (two score columns, `reward` or `reward_model`), `helper` (log-ratio margin of a helper model trained by
    DPO on `seed_pairs` random pairs, as in the paper), `implicit` (that of the run's own policy, by a pass over the
    data), and any numeric column as `column:<name>`. A pair without a value in a source is judged by the others, one
    that none knows is not trained: `keep` is a share of those that are known.
    `refresh: never` chooses once; with `epoch` or a number of steps the policy's margins are measured and the bounds
    set anew (this package's adaptation). The paper's iterative form, which samples new responses in each round, is not
    built. `action: weight` weighs by p, and follows `refresh` too; with `epoch` from the second step of an epoch on.
    When: large, noisy preference sets; 5 to 25% of the pairs often suffice.
    When not: `implicit` says nothing before the policy has moved from its reference. A small beta with several epochs
    on few pairs of large margin can make the log-probabilities collapse: one epoch, or a smaller learning rate.
    Plan of 1,000,000 pairs, two margins known: 0.7 s and 0.1 GB.
    """

    sources: Sequence[str] = field(
        default=("explicit", "helper"), metadata={"help": "any of explicit, implicit, helper, column:<name>"}
    )
    fusion: str = field(default="product", metadata={"help": f"one of {', '.join(FUSIONS)}; all but product use raw"})
    keep: float | None = field(default=0.1, metadata={"help": "share of the pairs to keep, in (0, 1]"})
    lower: float = field(default=-2.0, metadata={"help": "lower bound M1 of every source"})
    refresh: int | str = field(default="never", metadata={"help": '"never", "epoch" or a number of optimizer steps'})
    seed_pairs: int = field(default=2000, metadata={"help": "helper: random pairs it is trained on (at most half)"})
    helper_model: str | None = field(
        default=None, metadata={"help": "helper: another model with the same tokenizer; default the policy as it is"}
    )
    helper_lora: bool = field(default=True, metadata={"help": "helper: LoRA (r 16) or full fine-tuning"})
    helper_epochs: float = field(default=2.0, metadata={"help": "helper: epochs on the seed pairs"})
    helper_learning_rate: float | None = field(
        default=None, metadata={"help": "helper: default 3e-4, or without LoRA the run's own"}
    )

    signals = (Signal.EXPLICIT_MARGIN, Signal.IMPLICIT_MARGIN)
    trainers = ("dpo",)
    paper = "hf.co/papers/2502.14560"
    reads: ClassVar[Reads] = {
        **score_reads(among("sources", "explicit")),
        "refresh": (),
        "lower": (either(when("fusion", "product"), when("action", "keep_top")),),
        "temperature": (when("action", "sample"),),
        **{
            name: (among("sources", "helper"),)
            for name in ("seed_pairs", "helper_model", "helper_lora", "helper_epochs", "helper_learning_rate")
        },
    }
    criterion = "external_discrete and internal"
    renamed: ClassVar[dict[str, str]] = {"num": "keep (the share of all pairs)"}
    selector = "top_k, weight, sample"
    charges = (
        Charge("helper_trainings", "helper_epochs", per="seed pair", when="sources: helper", reference=True),
        Charge("helper_forwards", when="sources: helper", reference=True),
        Charge("forwards", per="example and plan", when="sources: implicit", reference=True, at_most=True),
        *ExplicitMargin.charges,
    )
    live = False
    state = "its score column and one per measured source (8 bytes per example each)"
    actions: ClassVar[tuple[str, ...]] = ("keep_top", "weight", "sample")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sources = tuple(self.sources)
        if not self.sources or len(set(self.sources)) < len(self.sources):
            raise ValueError(f"sources={list(self.sources)} must name at least one source, and none twice.")
        for source in self.sources:
            if not source.startswith("column:"):
                check_choice("sources", source, (*OWN_SOURCES, "column:<name>"))
        check_choice("fusion", self.fusion, FUSIONS)
        check_whole("seed_pairs", self.seed_pairs, 1)
        check_range("helper_epochs", self.helper_epochs, 0, 1000, open_low=True)
        self.check_reward()
        self._fused: np.ndarray | None = None
        self._measured, self._period = -1, 0

    @property
    def hooks(self) -> frozenset[str]:
        renews = self.action == "weight" and self.refresh != "never"
        return super().hooks - (set() if renews else {"observe"})

    @property
    def explicit(self) -> bool:
        return "explicit" in self.sources

    @property
    def columns(self) -> tuple[str, ...]:
        named = (source.partition(":")[2] for source in self.sources if source.startswith("column:"))
        return (*super().columns, *named)

    # ---- The margins ----

    def setup(self, run: Run) -> None:
        super().setup(run)
        run.ledger.add(self.name)
        if "helper" in self.sources and not run.resumed:
            helper = helper_settings(self, run.stream_seed("bees/helper"))
            measure = lambda: {"margin": self._helper_margins(run, helper)}  # noqa: E731
            found = cached(run, "bees-helper", [self.seed_pairs], measure, uses=("seed",), helpers=[helper])
            run.ledger.write(f"{self.name}_helper", None, found["margin"], step=0)
        if self.action == "weight":
            self._fuse(run)

    def _seed_size(self, run: Run) -> int:
        return min(self.seed_pairs, max(1, run.size // 2))

    def units(self, run: Run) -> dict[str, float]:
        plans = len(run.plan_steps(self.refresh))
        return {**super().units(run), "seed pair": self._seed_size(run), "example and plan": run.size * plans}

    def _helper_margins(self, run: Run, helper: dict[str, Any]) -> np.ndarray:
        """Log-ratio margins of all pairs under the helper model, `(N,)`."""
        size = self._seed_size(run)
        values = run.train_helper(
            run.rng("bees/seed_pairs").choice(run.size, size, replace=False),
            np.arange(run.size),
            log_ratio_margin,
            evaluations=1,
            description="Helper model, evaluation",
            **helper,
        )
        return values[-1]

    def _margins(self, run: Run, source: str) -> np.ndarray:
        if source == "explicit":
            return self.explicit_margin(run)
        if source.startswith("column:"):
            return run.column(source.partition(":")[2])
        if source == "implicit" and self._measured != run.step:
            values = run.passes.measure(log_ratio_margin, description="Scoring implicit margins")
            run.ledger.write(f"{self.name}_implicit", None, values, run.step)
            self._measured = run.step
        return known_scores(run, f"{self.name}_{source}")

    def _fuse(self, run: Run) -> tuple[np.ndarray, np.ndarray]:
        """Fused value of each pair, and what decides between equal ones."""
        margins = [self._margins(run, source).astype(np.float64) for source in self.sources]
        divisors = [IMPLICIT_DIVISOR if s in ("implicit", "helper") else EXTERNAL_DIVISOR for s in self.sources]
        uppers = [upper_bound(margin, divisor) for margin, divisor in zip(margins, divisors, strict=True)]
        if self.fusion == "product":
            pairs = zip(margins, uppers, strict=True)
            fused = fuse_probabilities([margin_probability(margin, self.lower, upper) for margin, upper in pairs])
        else:
            fused = fuse_margins(margins, self.fusion)
        known = np.isfinite(margins).any(axis=0)
        run.ledger.write(self.name, None, np.where(known, fused, np.nan), run.step)
        # A pair that no source knows is not one of even chances: it has no weight and is not chosen.
        fused = np.where(known, fused, -np.inf)
        self._fused = fused.astype(np.float32)
        return fused, unclipped_evidence(margins, self.lower, uppers)

    # ---- What is done about them ----

    def epoch_size(self, run: Run) -> int | None:
        return None if self.action == "weight" else self.share_of(run, self.scores(run))

    def select(self, run: Run) -> np.ndarray:
        if self.refresh == "never" and self._mask is not None:
            return self._mask
        fused, evidence = self._fuse(run)
        tell_ties(run, self.name, fused, "the evidence beyond the bounds")
        run.decide(fused, f"{self.action}, a share of {self.keep_share:g}")
        evidence = untied(evidence, tie_rng(run, self.name))
        self._mask = np.zeros(run.size, dtype=bool)
        self._mask[select_fused(fused, self.share_of(run, fused), evidence)] = True
        return self._mask

    def scores(self, run: Run) -> np.ndarray:
        if self._fused is None or self.refresh != "never":
            self._fuse(run)
        assert self._fused is not None
        return self._fused

    def weigh(self, batch: Batch) -> Tensor | None:
        assert self._fused is not None
        return torch.from_numpy(self._fused[batch.ids.cpu().numpy()]).to(batch.ids.device)

    def observe(self, run: Run, step: Step) -> None:
        period = run.step // self.refresh if isinstance(self.refresh, int) else run.epoch
        # After the last step nothing is weighed any more.
        if period != self._period and run.step < run.max_steps:
            self._period = period
            self._fuse(run)

    def state_dict(self) -> dict[str, Any]:
        fused = {} if self._fused is None else {"fused": self._fused}
        return {**super().state_dict(), **fused, "measured": self._measured, "period": self._period}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._fused, self._measured, self._period = state.get("fused"), state["measured"], state["period"]


def log_ratio_margin(batch: Batch) -> Tensor:
    """Implicit margin of each pair without beta, `(B,)`."""
    assert isinstance(batch, PairBatch)
    return batch.log_ratio_margin
