"""Pairs by the probability that their label is wrong, as `dsel audit` finds it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ...bases.helper_model import helper_settings
from ...bases.offline import Prescored
from ...bases.replaced_loss import check_sigmoid
from ...core.charges import Charge
from ...core.method import Run
from ...core.parameters import Reads, among, check_range, check_whole, when
from ...core.registry import register
from ...data.responses import prompt_text, prompts_of, responses_of
from ...data.tokens import Sequences, start_tokens
from ...functional.audit.pair_texts import compared_elsewhere, groups_of, relevance
from ...functional.preference.selective_dpo import half_split
from ...functional.preference.soft_labels import soft_label_gate_weight
from ...scorers.label_audit import SIGNALS, AuditSettings, PairFeatures, audit_labels
from ...scorers.pair_features import pair_differences
from ...scorers.responses import DEPTHS, ResponseReader, read_responses
from ...signals.batch import Batch, Signal
from ...signals.pair_batch import PairBatch

HELPER = "helper"
SOURCES = (*SIGNALS, HELPER)
SIDES = ("chosen", "rejected")


@register("audit")
@dataclass
class Audit(Prescored):
    """
    Finds the labels that are probably wrong before training, and flips, softens or leaves out their pairs.

    What: each label is judged by models that were fitted to the labels of other prompts: on words that prompt and
    response share (`texts`), other pairs of the same responses (`comparisons`), statistics of the token
    log-probabilities with and without the prompt (`statistics`), a linear probe on the policy's hidden states of three
    layers (`states`), extremely randomised trees on all of it (`trees`), and held-out margins of two helper models
    over their training (`helper`). One probability comes of it, with the share of wrong labels estimated (the middle
    between how many the surest opinions and how many all of them contradict; `noise_rate` sets it), the same as in
    `dsel audit`. `action: soft` trains the loss expected under it, `(1 - q) L(u) + q L(-u)`, exactly; `flip` changes
    the places of responses whose label is wrong with at least `flip_above`; `keep_top` and the others leave out or
    weigh by the probability that the label is right, which is the score.
    When: labels of machine judges or crowds, some of them wrong, if what the right ones follow can be learned.
    When not: fewer than some hundred pairs; labels that are wrong in a systematic way look right; `helper` says little
    at 20% of wrong labels or more.
    """

    action: str = field(default="soft", metadata={"help": "soft, flip, keep_top, keep_bottom, band, weight"})
    sources: Sequence[str] = field(default=SIGNALS, metadata={"help": f"any of {', '.join(SOURCES)}"})
    noise_rate: float | None = field(default=None, metadata={"help": "share of wrong labels; default estimated"})
    flip_above: float = field(default=0.6, metadata={"help": "flip: probability of a wrong label from which on"})
    folds: int = field(default=10, metadata={"help": "each label is judged by models of the other folds"})
    trees: int = field(default=200, metadata={"help": "trees: how many, per fold"})
    helper_epochs: float = field(default=1.0, metadata={"help": "helper: epochs of each helper run"})
    helper_learning_rate: float | None = field(
        default=None, metadata={"help": "helper: default 3e-4, or without LoRA the run's own"}
    )
    helper_lora: bool = field(default=True, metadata={"help": "helper: LoRA (r 16) or full helper models"})
    evaluations: int = field(default=3, metadata={"help": "helper: times each helper is evaluated"})

    signals = (Signal.IMPLICIT_MARGIN,)
    trainers = ("dpo",)
    selector = "soft labels, top_k, weight"
    charges = (
        Charge("forwards", "4", when="sources: statistics or sources: states"),
        Charge("helper_trainings", "helper_epochs", when="sources: helper", reference=True),
        Charge("helper_forwards", "evaluations", when="sources: helper", reference=True),
    )
    actions: ClassVar[tuple[str, ...]] = ("soft", "flip", "keep_top", "keep_bottom", "band", "weight")
    acting: ClassVar[frozenset[str]] = frozenset({"keep", "flip_above"})
    reads: ClassVar[Reads] = {
        "temperature": (),
        "flip_above": (when("action", "flip"),),
        "trees": (among("sources", "trees"),),
        **{
            name: (among("sources", HELPER),)
            for name in ("helper_epochs", "helper_learning_rate", "helper_lora", "evaluations")
        },
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sources = tuple(self.sources)
        unknown = [source for source in self.sources if source not in SOURCES]
        if unknown or len(set(self.sources)) < len(self.sources):
            raise ValueError(f"sources={list(self.sources)} must name any of {list(SOURCES)}, and none twice.")
        check_range("flip_above", self.flip_above, 0.5, 1)
        check_range("helper_epochs", self.helper_epochs, 0, 1000, open_low=True)
        check_whole("evaluations", self.evaluations, 1, 1000)
        self._settings(0)
        self.own_loss = self.action in ("soft", "flip")
        # The factors of another loss are no importance.
        self.normalize = "none" if self.own_loss else "mean1"

    def _settings(self, seed: int) -> AuditSettings:
        signals = tuple(source for source in self.sources if source != HELPER)
        if set(signals) <= {"trees"} and HELPER in self.sources:
            signals = ("texts", *signals)
        return AuditSettings(signals, self.folds, self.noise_rate, self.trees, seed)

    @property
    def hooks(self) -> frozenset[str]:
        return super().hooks - {"select"} | {"weigh"} if self.own_loss else super().hooks

    @property
    def uses(self) -> tuple[str, ...]:
        return ("policy", "seed")

    def helpers(self, run: Run) -> list[dict[str, Any]]:
        return [helper_settings(self, run.stream_seed("audit/helper"))] if HELPER in self.sources else []

    def check(self, run: Run) -> None:
        super().check(run)
        if self.own_loss:
            check_sigmoid(run, f"action={self.action!r}")
        if run.sharded:
            raise ValueError(
                "'audit' reads the whole model before training, which FSDP and DeepSpeed do not have in place then: "
                "run `dsel audit` beforehand, and train on its cleaned file or give one minus its `probability` as a "
                "column of weights (weight_column)."
            )

    # ---- The probability ----

    def measure(self, run: Run) -> dict[str, np.ndarray]:
        prompts = [prompt_text(prompt) for prompt in prompts_of(run.dataset)]
        texts = [responses_of(run.dataset, side, run.rows.end) for side in SIDES]
        own, shared = relevance(prompts, *texts)
        features = PairFeatures(groups_of(prompts), own, shared, compared_elsewhere(prompts, *texts))
        if {"statistics", "states"} & set(self.sources):
            self._read(run, features)
        if HELPER in self.sources:
            features.more = self._helper_margins(run)
        found = audit_labels(features, self._settings(run.seed))
        run.log({"audit_noise_rate": found.noise_rate, "audit_calibration_error": found.calibration_error})
        low, high = found.noise_range
        run.tell(
            "audit",
            f"'audit': about {found.noise_rate:.1%} of the labels are wrong (between {low:.1%} and {high:.1%}); "
            f"held-out labels are foretold with an area under the curve of {found.predicted:.2f} (by length alone "
            f"{found.by_length:.2f}).",
            20,
        )
        return {self.name: 1.0 - found.probability, f"{self.name}_agreement": found.agreement}

    def _read(self, run: Run, features: PairFeatures) -> None:
        arguments = run.arguments
        autocast = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None
        reader = ResponseReader(
            run.model,
            start_tokens(run.processing_class),
            depths=DEPTHS if "states" in self.sources else (),
            autocast=autocast,
            costs=run.costs,
            what="forwards",
        )
        values, lengths = [], []
        for side in SIDES:
            sequences = Sequences(run.rows.side(side))
            totals, trained = sequences.scan()
            lengths.append(trained)
            values.append(
                read_responses(
                    reader,
                    sequences,
                    np.arange(run.size),
                    totals,
                    passes=run.passes,
                    pad=sequences.pad,
                    device=sequences.device,
                    description=f"Reading {side} responses",
                )
            )
        found = pair_differences(values[0], values[1], reader)
        features.lengths, features.statistics = np.stack(lengths, axis=1), found.pop("statistics")
        features.states = {int(name.removeprefix("layer_")): states for name, states in found.items()}

    def _helper_margins(self, run: Run) -> dict[str, np.ndarray]:
        """Margins of each pair under the helper that has not seen it: at the end, on average, and how they moved."""
        (helper,) = self.helpers(run)
        split = half_split(run.size, helper["seed"])
        margins = np.zeros((self.evaluations, run.size), dtype=np.float32)
        halves = ((split.first_train, split.first_eval), (split.second_train, split.second_eval))
        for number, (train_ids, score_ids) in enumerate(halves):
            margins[:, score_ids] = run.train_helper(
                train_ids,
                score_ids,
                _margin,
                evaluations=self.evaluations,
                description=f"Helper model {number + 1}/2, evaluation",
                **helper,
            )
        return {
            "helper_margin": margins[-1],
            "helper_mean_margin": margins.mean(axis=0),
            "helper_moved": margins[-1] - margins[0],
        }

    # ---- What is done about it ----

    def weights(self, scores: np.ndarray) -> np.ndarray:
        return scores

    def weigh(self, batch: Batch) -> Tensor:
        if not self.own_loss:
            return super().weigh(batch)
        assert isinstance(batch, PairBatch)
        right = self._ledger()[batch.ids.cpu().numpy()].astype(np.float64)
        known = np.isfinite(right)
        wrong = np.where(known, 1.0 - np.where(known, right, 1.0), 0.0).clip(0.0, 1.0)
        if self.action == "flip":
            wrong = (wrong >= self.flip_above).astype(np.float64)
        chances = torch.from_numpy(wrong.astype(np.float32)).to(batch.ids.device)
        factors = soft_label_gate_weight(batch.implicit_margin, chances.to(batch.implicit_margin.device))
        # A pair that could not be judged is not trained.
        return factors * torch.from_numpy(known).to(factors.device)


def _margin(batch: Batch) -> Tensor:
    assert isinstance(batch, PairBatch)
    return batch.implicit_margin
