"""Pairs in stages, from clear to close ones."""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset

from ...bases.explicit_margin import ExplicitMargin, score_reads
from ...core.method import Run, Step
from ...core.parameters import Reads, check_choice, check_whole, given, without
from ...core.registry import register
from ...data.columns import column_values
from ...data.responses import as_response, plain_prompt, prompts_of, unprepared
from ...functional.preference.curry_dpo import curriculum_pairs, curriculum_stages, split_stages
from ...signals.batch import Signal

STAGE = "stage"


@register("curry_dpo")
@dataclass
class CurryDpo(ExplicitMargin):
    """
    Trains the pairs of a prompt in stages: the best response against the worst first, against the second best last.

    What: with `responses_column` (a list of responses per prompt) and `scores_column` (their scores) the dataset is
    built anew: the best response is paired with each lower one, the largest gap of every prompt in stage 1, and so on
    (hf.co/papers/2403.07230). Without it each row is one pair, and the pairs are sorted by their explicit margin
    (columns, `reward` or `reward_model`) and cut into `stages` of equal size. Within a stage the order is random.
    Pairs of equal scores, of the wrong order or without a score are dropped. An epoch goes through all stages once:
    the paper's run is one epoch. In the paper each stage is a run of DPO that begins where the last one ended: so the
    policy becomes the reference of the next stage (`refresh_reference`), and the schedule of the learning rate,
    warm-up included, is run through once per stage (`schedule: run` stretches it over all of them, and the hard pairs
    come when it has decayed). The optimizer's moments go on from stage to stage.
    When: several scored responses per prompt. When not: with LoRA or precomputed log-probabilities, where the
    reference cannot change: that is said, and the old one stays. The run keeps a full copy of the reference model per
    stage under `output_dir/selection`.
    Plan of 1,000,000 pairs: 0.3 s and 40 MB.
    """

    responses_column: str | None = field(default=None, metadata={"help": "list column with responses per prompt"})
    scores_column: str = field(default="scores", metadata={"help": "list column with the scores of those responses"})
    stages: int = field(default=3, metadata={"help": "stages of data with one pair per row"})
    refresh_reference: bool | None = field(
        default=None,
        metadata={"help": "make the policy the reference after each stage; default where the reference can change"},
    )
    schedule: str = field(
        default="stage", metadata={"help": '"stage": the learning-rate schedule anew in each stage; "run": once'}
    )

    signals = (Signal.EXPLICIT_MARGIN,)
    trainers = ("dpo",)
    paper = "hf.co/papers/2403.07230"
    reads: ClassVar[Reads] = {
        **score_reads(without("responses_column")),
        "scores_column": (given("responses_column"),),
        "stages": (without("responses_column"),),
    }
    criterion = "external_discrete"
    selector = "curriculum"
    state = "the stage of each pair (8 bytes)"

    def __post_init__(self) -> None:
        check_whole("stages", self.stages, 1, 1000)
        check_choice("schedule", self.schedule, ("stage", "run"))
        self.check_reward()
        self._stage = np.empty(0, dtype=np.int32)
        self._epoch, self._trained, self._reference = 0, 0, ""
        self._run: Run | None = None
        self._gaps: np.ndarray | None = None
        self._renews = True

    @property
    def explicit(self) -> bool:
        return self.responses_column is None

    @property
    def hooks(self) -> frozenset[str]:
        unused = {"rebuild"} if self.responses_column is None else set()
        unused |= {"observe"} if self.refresh_reference is False else set()
        return super().hooks - (unused | ({"begin"} if self.schedule == "run" else set()))

    def check(self, run: Run) -> None:
        arguments, fixed = run.arguments, ""
        if getattr(arguments, "precompute_ref_log_probs", False):
            fixed = "changes the reference: set precompute_ref_log_probs=False."
        elif hasattr(run.model, "peft_config"):
            fixed = "needs a reference model of its own, which LoRA training has not."
        elif getattr(arguments, "sync_ref_model", False):
            fixed = "and sync_ref_model=True both change the reference: set one."
        if fixed and self.refresh_reference:
            raise ValueError(f"refresh_reference=True {fixed}")
        self._renews = not fixed
        if fixed and self.refresh_reference is None:
            run.tell(
                f"{self.name}:reference",
                f"{self.name!r} makes the policy the reference of each next stage, as its paper does, but here the "
                f"reference stays as it is: refresh_reference=True {fixed}",
                logging.WARNING,
            )

    # ---- Pairs of several responses ----

    def rebuild(self, run: Run, dataset: Any) -> Dataset:
        assert self.responses_column is not None
        responses, scores = (
            list(column_values(dataset, name, "'curry_dpo'")) for name in (self.responses_column, self.scores_column)
        )
        prompts = prompts_of(dataset)
        for row, (texts, values) in enumerate(zip(responses, scores, strict=True)):
            if len(texts) != len(values):
                raise ValueError(f"Row {row} has {len(texts)} responses but {len(values)} scores.")
        values = [np.array([np.nan if v is None else v for v in row], dtype=np.float64) for row in scores]
        rivals = max(map(len, values), default=1) - 1
        picked = [
            (stage, prompt, pair)
            for stage, pairs in enumerate(curriculum_stages([curriculum_pairs(row) for row in values], rivals))
            for prompt, pair in pairs
        ]
        if not picked:
            raise ValueError(f"No prompt has two responses of different scores in {self.scores_column!r}.")
        kept = unprepared(dataset, "chosen", "rejected", "score_chosen", "score_rejected", STAGE)
        kept = kept.remove_columns([self.responses_column, self.scores_column])
        rows = kept.select([prompt for _, prompt, _ in picked])

        def response(prompt: int, position: int) -> Any:
            value = responses[prompt][position]
            return as_response(value, prompts[prompt]) if isinstance(value, str) else plain_prompt(value)

        new: dict[str, list[Any]] = {
            "chosen": [response(prompt, pair.chosen) for _, prompt, pair in picked],
            "rejected": [response(prompt, pair.rejected) for _, prompt, pair in picked],
            "score_chosen": [float(values[prompt][pair.chosen]) for _, prompt, pair in picked],
            "score_rejected": [float(values[prompt][pair.rejected]) for _, prompt, pair in picked],
            STAGE: [stage for stage, _, _ in picked],
        }
        return Dataset.from_dict({**{name: rows[name] for name in rows.column_names}, **new})

    # ---- Order ----

    def setup(self, run: Run) -> None:
        super().setup(run)
        self._run = run
        self._stage = np.full(run.size, -1, dtype=np.int32)
        if self.responses_column is not None:
            self._stage[:] = run.column(STAGE)
        else:
            self._gaps = self.explicit_margin(run)
            for stage, ids in enumerate(split_stages(self._gaps, self.stages)):
                self._stage[ids] = stage
        run.ledger.write(self.name, None, np.where(self._stage < 0, np.nan, -self._stage), step=0)

    def epoch_size(self, run: Run) -> int:
        return int((self._stage >= 0).sum())

    def select(self, run: Run) -> np.ndarray:
        if self._gaps is None:
            run.decide(run.ledger[self.name], "minus the stage")
        else:
            run.decide(self._gaps, "the gap of the scores, which must be above 0")
        return self._stage >= 0

    def order(self, run: Run, ids: np.ndarray) -> np.ndarray:
        shuffled = run.plan_rng("curry_dpo/order").permutation(np.sort(ids))
        return shuffled[np.argsort(self._stage[shuffled], kind="stable")]

    # ---- A stage is a run: its schedule, and the reference of the next one ----

    def begin(self, run: Run) -> None:
        arguments = run.arguments
        step = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * run.world
        borders = np.cumsum(np.bincount(self._stage[self._stage >= 0]))
        if not len(borders):
            return
        per_epoch = -(-int(borders[-1]) // step)
        firsts = np.unique(np.concatenate([[0], -(-borders[:-1] // step)]))
        epochs = -(-run.max_steps // per_epoch)
        run.restart_rate([int(epoch * per_epoch + first) for epoch in range(epochs) for first in firsts])

    def observe(self, run: Run, step: Step) -> None:
        if not self._renews:
            return
        if run.epoch != self._epoch:
            self._epoch, self._trained = run.epoch, 0
        before, self._trained = self._trained, self._trained + len(step.ids)
        # The last stage has no next one.
        borders = np.cumsum(np.bincount(self._stage[self._stage >= 0]))[:-1]
        passed = np.flatnonzero((borders > before) & (borders <= self._trained))
        if len(passed):
            self._reference = f"reference-{self.name}-{run.step}.safetensors"
            run.refer(Path(run.output_dir) / "selection" / self._reference, False)

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "trained": self._trained, "reference": self._reference}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._epoch, self._trained, self._reference = state["epoch"], state["trained"], state["reference"]
        if self._reference:
            assert self._run is not None
            self._run.refer(Path(self._run.output_dir) / "selection" / self._reference, True)
