"""Pairs whose external margin is large and not yet reached by the model."""

import logging
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ...bases.explicit_margin import ExplicitMargin, score_reads
from ...bases.scored import ByScore, keep_top, known_scores, tell_ties, tie_rng, untied
from ...bases.unseen import is_constant
from ...core.charges import Charge
from ...core.method import Run, Step
from ...core.parameters import Reads, check_choice, check_range, check_whole, either, given, unless, when, without
from ...core.registry import register
from ...data.build.self_play import build
from ...data.responses import UNFINISHED
from ...functional.margins import average_logps, simpo_margin
from ...functional.preference.alignment_potential import Moments, alignment_potential, margin_moments, reward_spread
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
    `form: dpo` the reward margin of the run. As in the paper the margins are measured over the whole dataset before
    training and the choice is made once; with `refresh` all pairs are measured again for each plan, or, with
    `prescore: false`, the margins are those that the pairs had when they were last trained, for nothing. `action:
    weight` takes the margin of each pair as it is now, on the scale of the mean and the deviation over the dataset.
    In the paper the chosen response is the one of the higher score. A pair whose scores say the opposite of its labels
    (d < 0) is not trained (`contradicted: drop`); `keep` takes it by |d| as the formula does, which *prefers* it where
    the scores are right.
    `self_play: 5` first adds pairs of the policy's own, the best of 5 samples per prompt against the worst by the
    reward; a prompt of which `max_new_tokens` cuts a sample off gives none (`unfinished`). With `evolve` the prompts
    are rewrites, by the policy, of those of the highest potential (all pairs are scored for that, and 5 rewrites
    generated per chosen prompt). All given pairs stay, `keep` is the share of the new ones, and the z-scores are over
    these. Other columns are empty in the new rows.
    When: pairs with trustworthy external scores.
    When not: labels that are wrong where the scores are wrong too. `form: dpo` knows no implicit margin before the
    policy has moved from its reference, so a first choice is by |d| alone.
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
    unfinished: str = field(
        default="drop", metadata={"help": 'self_play: samples cut off by the cap: "drop", or "keep" as if they ended'}
    )
    prescore: bool = field(
        default=True, metadata={"help": "measure the implicit margins of all pairs, before training and for each plan"}
    )
    all_scores_column: str | None = field(
        default=None, metadata={"help": "instead: column with the scores of all sampled responses; d = max - min"}
    )
    contradicted: str = field(
        default="drop", metadata={"help": 'pairs whose scores contradict their labels: "drop", or "keep" by |d|'}
    )
    refresh: int | str = field(
        default="never", metadata={"help": 'when to measure and choose anew: "never", "epoch", or optimizer steps'}
    )

    signals = (Signal.EXPLICIT_MARGIN, Signal.IMPLICIT_MARGIN)
    trainers = ("dpo",)
    paper = "hf.co/papers/2503.01864"
    reads: ClassVar[Reads] = {
        **score_reads(without("all_scores_column")),
        "reward": (either(without("all_scores_column"), given("self_play")),),
        "reward_model": (either(without("all_scores_column"), given("self_play")),),
        "prescore": (either(when("action", "weight"), unless("refresh", "never")),),
        "contradicted": (without("all_scores_column"),),
        "evolve": (given("self_play"),),
        "max_new_tokens": (given("self_play"),),
        "unfinished": (given("self_play"),),
    }
    criterion = "external_discrete and internal"
    selector = "top_k"
    charges = (
        Charge("forwards", per="example and plan", when="prescore and form: simpo", at_most=True),
        Charge("forwards", per="example and plan", when="prescore and form: dpo", reference=True, at_most=True),
        *ExplicitMargin.charges,
        Charge("generated_responses", "self_play", per="prompt", when="self_play"),
        Charge("rewards", "self_play", per="prompt", when="self_play"),
    )
    cost = "no extra forward while training"
    state = "two columns (16 bytes per example)"
    live = False
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
        check_choice("unfinished", self.unfinished, UNFINISHED)
        check_choice("contradicted", self.contradicted, ("drop", "keep"))
        self._given = np.empty(0, dtype=bool)
        self._spread: np.ndarray | None = None
        self._measured_at = -1
        self._moments: tuple[Moments, Moments] | None = None

    @property
    def hooks(self) -> frozenset[str]:
        weighs = self.action == "weight"
        # What is measured anew, or never, is not read from the batches.
        unused = set() if weighs or not self._renews else {"score"}
        unused |= set() if self.self_play else {"rebuild"}
        return super().hooks - (unused | (set() if weighs else {"observe", "begin"}))

    @property
    def _renews(self) -> bool:
        """Whether the margins of all pairs are measured before training, and not those of the trained ones kept."""
        return self.prescore or self.refresh == "never"

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

    def _implicit_margins(self, run: Run) -> np.ndarray:
        """Implicit margins of all pairs, `(N,)`; only the form `dpo` asks the reference."""
        return run.passes.measure(self.implicit, reference=self.form == "dpo", description="Scoring implicit margins")

    def rebuild(self, run: Run, dataset: Any) -> Any:
        evolve = None
        if self.evolve:
            found = dataset_rewards(run, ("chosen", "rejected"), self.reward, self.reward_model)
            implicit = self._implicit_margins(run)
            explicit = self._agreed(found["chosen"] - found["rejected"])
            potential = alignment_potential(explicit, implicit, self.weight, self.normalize_margins)
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
            unfinished=self.unfinished,
            evolve=evolve,
            seed=run.stream_seed("alignment_potential/self_play"),
        )

    def units(self, run: Run) -> dict[str, float]:
        given = int(self._given.sum())
        plans = len(run.plan_steps("never" if self.action == "weight" else self.refresh))
        return {
            **super().units(run),
            "prompt": given if not self.evolve else 5 * keep_count(self.evolve, given),
            "example and plan": run.size * plans,
        }

    def setup(self, run: Run) -> None:
        super().setup(run)
        self._given = run.column("self_play") == 0 if self.self_play else np.zeros(run.size, dtype=bool)
        run.ledger.add(self.MARGIN)
        if self._renews and not run.resumed:
            self._measure(run)
            if self.form == "dpo" and is_constant(run.ledger[self.MARGIN]):
                run.tell(
                    f"{self.name}:untrained",
                    f"{self.name!r}: the policy is still its reference, so that form='dpo' knows no implicit margin "
                    "and the first choice is by the scores alone. form='simpo' does not need a reference.",
                    logging.WARNING,
                )

    def _measure(self, run: Run) -> None:
        run.ledger.write(self.MARGIN, None, self._implicit_margins(run), run.step)
        self._measured_at = run.step

    # ---- Weights: the margin of the moment, on the scale of the whole dataset ----

    def begin(self, run: Run) -> None:
        self._moments = (
            margin_moments(self._agreed(self.explicit_margin(run))),
            margin_moments(run.ledger[self.MARGIN]),
        )

    def observe(self, run: Run, step: Step) -> None:
        assert self._moments is not None
        self._moments = self._moments[0], margin_moments(run.ledger[self.MARGIN])

    def score(self, batch: Batch) -> dict[str, Tensor]:
        implicit = self.implicit(batch)
        if self.action != "weight":
            return {self.MARGIN: implicit}
        explicit = self._agreed(self.batch_margin(batch).double().cpu().numpy())
        potential = alignment_potential(
            explicit, implicit.double().cpu().numpy(), self.weight, self.normalize_margins, moments=self._moments
        )
        potential = np.where(explicit == -np.inf, -np.inf, potential)
        return {self.MARGIN: implicit, self.name: torch.from_numpy(potential).float().to(batch.ids.device)}

    # ---- The choice ----

    def _agreed(self, explicit: np.ndarray) -> np.ndarray:
        """Explicit margins, -inf where the scores contradict the labels and such pairs are not trained."""
        return np.where(explicit < 0, -np.inf, explicit) if self.contradicted == "drop" else explicit

    def epoch_size(self, run: Run) -> int | None:
        # Who may be chosen is a matter of the external scores: no margin has to be measured for it.
        if self.action == "weight":
            return None
        known = np.isfinite(self._agreed(self.explicit_margin(run)))
        return self.share_of(run, np.where(known, 0.0, -np.inf))

    def scores(self, run: Run) -> np.ndarray:
        if self.prescore and self.refresh != "never" and self._measured_at != run.step:
            self._measure(run)
        explicit = self._agreed(self.explicit_margin(run))
        implicit = known_scores(run, self.MARGIN)
        # A pair whose margin is not known yet stands at the mean of the known ones.
        known = np.isfinite(implicit)
        filled = np.where(known, np.abs(implicit), np.abs(implicit[known]).mean() if known.any() else 0.0)
        potential = np.empty(run.size)
        # Pairs of the policy's own compete among themselves.
        for group in (self._given, ~self._given):
            potential[group] = alignment_potential(explicit[group], filled[group], self.weight, self.normalize_margins)
        return np.where(np.isfinite(potential), potential, -np.inf).astype(np.float32)

    def share_of(self, run: Run, scores: np.ndarray) -> int:
        given = int((self._given & ~np.isinf(scores)).sum())
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
            mask = (self._given & np.isfinite(scores)) | keep_top(
                untied(own, tie_rng(run, self.name)), self.keep_share
            )
        self._mask = mask
        run.ledger.write(self.name, None, scores, run.step)
        return mask

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "measured_at": self._measured_at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._measured_at = int(state["measured_at"])
