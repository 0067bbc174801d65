"""Pairs whose external margin is large and not yet reached by the model."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ...bases.explicit_margin import ExplicitMargin, score_reads
from ...bases.scored import ByScore, keep_top, known_scores, tell_ties, tie_rng, untied
from ...core.charges import Charge
from ...core.method import Run
from ...core.parameters import Reads, check_choice, check_range, check_whole, either, given, unless, without
from ...core.registry import register
from ...data.build.self_play import build
from ...functional.margins import average_logps, simpo_margin
from ...functional.preference.alignment_potential import alignment_potential, reward_spread
from ...functional.ranking import keep_count, top_k
from ...scorers.rewards import counted, dataset_rewards, reward_of, score_responses
from ...signals.batch import Batch, Signal
from ...signals.pair_batch import PairBatch


@register("alignment_potential")
@dataclass
class AlignmentPotential(ExplicitMargin, ByScore):
    """
    Keeps the pairs with the largest alignment potential: external margin minus the margin the model already has.

    What: `z(|d|) - weight * z(|m|)` with d the difference of two scores (columns, `reward` or
    `reward_model`; or max - min of a column with the scores of all sampled responses) and m the implicit margin
    (hf.co/papers/2503.01864). `form: simpo` takes the length-normalised, reference-free margin of the released code,
    measured once over the whole dataset before training; `form: dpo` takes the reward margin of the run. Both follow
    the model: margins of trained pairs are renewed for free, and count from the next plan on.
    `self_play: 5` first adds pairs of the policy's own, the best of 5 samples per prompt against the worst by the
    reward; with `evolve` the prompts are rewrites, by the policy, of those of the highest potential (all pairs are
    scored for that, and 5 rewrites generated per chosen prompt). All given pairs stay, and `keep` is the share of the
    new ones.
    When: pairs with trustworthy external scores.
    When not: `form: dpo` without `prescore` knows no implicit margin at the start, so the first plan is by |d| alone.
    Plan of 1,000,000 pairs, margins known: 0.5 s and 76 MB.
    """

    keep: float | None = field(default=0.4, metadata={"help": "fraction to keep, in (0, 1]"})
    form: str = field(default="simpo", metadata={"help": '"simpo" (mean log-probabilities) or "dpo" (reward margin)'})
    weight: float = field(default=1.0, metadata={"help": "weight of the implicit term (2.5 in the paper's self-play)"})
    normalize_margins: str = field(default="zscore", metadata={"help": '"zscore", or "none" for raw |d| - |m|'})
    self_play: int = field(default=0, metadata={"help": "samples of the policy per prompt for new pairs; 0 = none"})
    evolve: float = field(
        default=0.0,
        metadata={"help": "self_play: share of the prompts to rewrite (0.25 in the paper); 0 = as they are"},
    )
    max_new_tokens: int = field(default=256, metadata={"help": "self_play: cap on the tokens of a sample"})
    prescore: bool = field(default=True, metadata={"help": "measure all implicit margins once before training"})
    all_scores_column: str | None = field(
        default=None, metadata={"help": "instead: column with the scores of all sampled responses; d = max - min"}
    )

    signals = (Signal.EXPLICIT_MARGIN, Signal.IMPLICIT_MARGIN)
    trainers = ("dpo",)
    paper = "hf.co/papers/2503.01864"
    reads: ClassVar[Reads] = {
        **score_reads(without("all_scores_column")),
        "reward": (either(without("all_scores_column"), given("self_play")),),
        "reward_model": (either(without("all_scores_column"), given("self_play")),),
        "normalize_margins": (unless("action", "weight"),),
        "prescore": (unless("action", "weight"),),
        "evolve": (given("self_play"),),
        "max_new_tokens": (given("self_play"),),
    }
    criterion = "external_continuous and internal"
    selector = "top_k"
    charges = (
        Charge("forwards", when="prescore and form: simpo"),
        Charge("forwards", when="prescore and form: dpo", reference=True),
        *ExplicitMargin.charges,
        Charge("generated_responses", "self_play", per="prompt", when="self_play"),
        Charge("rewards", "self_play", per="prompt", when="self_play"),
    )
    cost = "no extra forward while training"
    state = "two columns (16 bytes per example)"
    MARGIN: ClassVar[str] = "alignment_potential_implicit"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("form", self.form, ("simpo", "dpo"))
        check_choice("normalize_margins", self.normalize_margins, ("zscore", "none"))
        check_range("weight", self.weight, 0, float("inf"))
        self.check_reward()
        check_whole("self_play", self.self_play, 0, 1024)
        check_whole("max_new_tokens", self.max_new_tokens, 1, 2**20)
        check_range("evolve", self.evolve, 0, 1)
        if self.self_play and (not self.scores_itself or self.self_play < 2 or self.action != "keep_top"):
            raise ValueError(
                f"self_play={self.self_play} needs at least 2 samples, reward or reward_model, and action='keep_top'."
            )
        self._given = np.empty(0, dtype=bool)
        self._spread: np.ndarray | None = None

    @property
    def hooks(self) -> frozenset[str]:
        return super().hooks if self.self_play else super().hooks - {"rebuild"}

    @property
    def explicit(self) -> bool:
        return self.all_scores_column is None

    def check(self, run: Run) -> None:
        if self.all_scores_column is None:
            return
        if not run.size:
            raise ValueError(f"all_scores_column={self.all_scores_column!r} cannot be read whole from a stream.")
        scores = run.values(self.all_scores_column, f"all_scores_column={self.all_scores_column!r}")
        if not all(isinstance(row, list) for row in scores):
            raise ValueError(f"Column {self.all_scores_column!r} must hold a list of scores per row.")
        self._spread = reward_spread([[np.nan if v is None else v for v in row] for row in scores])

    def explicit_margin(self, run: Run) -> np.ndarray:
        return super().explicit_margin(run) if self._spread is None else self._spread

    def batch_margin(self, batch: Batch) -> Tensor:
        if self._spread is None:
            return super().batch_margin(batch)
        return torch.from_numpy(self._spread[batch.ids.cpu().numpy()]).float().to(batch.ids.device)

    def implicit(self, batch: Batch) -> Tensor:
        """Implicit margin of each pair in the chosen form, `(B,)`."""
        assert isinstance(batch, PairBatch)
        if self.form == "dpo":
            return batch.implicit_margin
        return simpo_margin(
            average_logps(batch.policy_chosen_logps, batch.chosen_lengths),
            average_logps(batch.policy_rejected_logps, batch.rejected_lengths),
            batch.settings.beta,
        )

    def _measured(self, run: Run) -> np.ndarray:
        """Implicit margins of all pairs, `(N,)`; only the form `dpo` asks the reference."""
        return run.passes.measure(self.implicit, reference=self.form == "dpo", description="Scoring implicit margins")

    def rebuild(self, run: Run, dataset: Any) -> Any:
        evolve = None
        if self.evolve:
            found = dataset_rewards(run, ("chosen", "rejected"), self.reward, self.reward_model)
            implicit = self._measured(run)
            potential = alignment_potential(found["chosen"] - found["rejected"], implicit, self.weight)
            evolve = top_k(potential, keep_count(self.evolve, len(potential)))
        return build(
            dataset,
            run.generate,
            partial(
                score_responses,
                counted(run, reward_of(self.reward, self.reward_model, run.model.device)),
                description="Scoring samples",
            ),
            responses=self.self_play,
            max_new_tokens=self.max_new_tokens,
            evolve=evolve,
            seed=run.stream_seed("alignment_potential/self_play"),
        )

    def units(self, run: Run) -> dict[str, float]:
        given = int(self._given.sum())
        return {**super().units(run), "prompt": given if not self.evolve else 5 * keep_count(self.evolve, given)}

    def setup(self, run: Run) -> None:
        super().setup(run)
        self._given = run.column("self_play") == 0 if self.self_play else np.zeros(run.size, dtype=bool)
        run.ledger.add(self.MARGIN)
        if self.prescore and not run.resumed:
            run.ledger.write(self.MARGIN, None, self._measured(run), step=0)

    def scores(self, run: Run) -> np.ndarray:
        explicit = self.explicit_margin(run)
        implicit = known_scores(run, self.MARGIN)
        # A pair whose margin is not known yet stands at the mean of the known ones.
        known = np.isfinite(implicit)
        filled = np.where(known, np.abs(implicit), np.abs(implicit[known]).mean() if known.any() else 0.0)
        potential = alignment_potential(explicit, filled, self.weight, self.normalize_margins)
        return np.where(np.isfinite(potential), potential, -np.inf).astype(np.float32)

    def share_of(self, run: Run, scores: np.ndarray) -> int:
        given = int(self._given.sum())
        return given + super().share_of(run, scores[~self._given])

    def select(self, run: Run) -> np.ndarray:
        scores = self.scores(run)
        if not self.self_play:
            mask = super().select(run)
        elif self.refresh == "never" and self._mask is not None:
            mask = self._mask
        else:
            own = np.where(self._given, -np.inf, scores)
            run.decide(own, f"{self.action}, a share of {self.keep_share:g}")
            tell_ties(run, self.name, own)
            mask = self._given | keep_top(untied(own, tie_rng(run, self.name)), self.keep_share)
        self._mask = mask
        run.ledger.write(self.name, None, scores, run.step)
        return mask

    def score(self, batch: Batch) -> dict[str, Tensor]:
        implicit = self.implicit(batch)
        raw = torch.abs(self.batch_margin(batch)) - self.weight * torch.abs(implicit)
        return {self.MARGIN: implicit} if self.action != "weight" else {self.MARGIN: implicit, self.name: raw}
