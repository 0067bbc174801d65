"""Pairs that are conditioned on the quality that is asked for."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ...bases.explicit_margin import ExplicitMargin, score_reads
from ...bases.unseen import is_constant
from ...core.charges import Charge
from ...core.method import Run
from ...core.parameters import Reads, without
from ...core.registry import register
from ...data.build.reward_augmented import GOAL_TEMPLATE, build, condition, knows_system_role, score_columns
from ...data.columns import list_lengths
from ...functional.preference.reward_augmented import goal_text
from ...functional.preference.reward_augmented import implicit_scores as ranked_scores
from ...scorers.rewards import dataset_rewards
from ...signals.batch import Batch, Signal
from ...signals.pair_batch import PairBatch


@register("reward_augmented")
@dataclass
class RewardAugmented(ExplicitMargin):
    """
    Makes two pairs of each: whichever response's score the prompt asks for, that response wins.

    What: before training the dataset becomes 2N rows whose prompts ask for a quality (hf.co/papers/2410.08067): a
    system message where the chat template knows one, else the beginning of the user's message or of the plain prompt.
    Scores come from columns, from a reward, or, with `implicit`, from the policy itself where it has been trained by
    DPO (`log policy - log reference`, measured before training); those of a reward or of the policy are put on the
    scale 1 to 10 by rank. Pairs whose scores contradict their order, or are equal, are left out. `half` augments a
    random half, so that the number of steps stays. Ids are rows of the new dataset. Evaluation data is conditioned on
    `best` (default: the highest score seen); at inference the prompt must ask for it as well
    ([`~dsel_trl.data.build.reward_augmented.condition`]). Prompts that lose their goal by `truncation_mode: keep_end`
    are refused.
    `attributes` asks for several scores at once (`Requested quality (1-10): helpfulness 4, verbosity 2.`). The paper
    has such goals, of five attributes; the wording is ours, and so is the order: a pair is left out where the mean of
    its attributes contradicts its labels, or where all of them are equal. `best` is by attribute then, and its default
    the highest of each, which no response may have at once: say what you want of attributes such as verbosity.
    When: judged pairs whose rejected responses are not all bad. When not: prompts must ask for a quality ever after.
    As files, and for streams: `dsel build reward-augmented`.
    """

    template: str = field(default=GOAL_TEMPLATE, metadata={"help": "text with one slot {g} for the score"})
    system_role: bool | None = field(
        default=None, metadata={"help": "whether the chat template knows a system message; null = find out"}
    )
    implicit: bool = field(
        default=False, metadata={"help": "score by the implicit reward of the policy, against the reference model"}
    )
    half: bool = field(default=False, metadata={"help": "augment a random half of the pairs only"})
    keep_equal: bool = field(default=False, metadata={"help": "keep pairs of equal scores (contradictory)"})
    attributes: dict[str, list[str]] | None = field(
        default=None,
        metadata={"help": "instead of one score: names of several, each with its chosen and its rejected column"},
    )
    best: float | dict[str, float] | None = field(
        default=None, metadata={"help": "score that evaluation asks for, or one by attribute; null = the highest"}
    )

    signals = (Signal.EXPLICIT_MARGIN, Signal.TEXT)
    trainers = ("dpo",)
    paper = "hf.co/papers/2410.08067"
    family = "raw"
    criterion = "external_discrete"
    selector = "builds the dataset"
    reads: ClassVar[Reads] = {
        **score_reads(without("implicit"), without("attributes")),
        "implicit": (without("attributes"),),
    }
    charges = (Charge("forwards", when="implicit", reference=True), *ExplicitMargin.charges)
    cost = "twice the rows and steps (half: as many as before)"
    state = "the dataset, on disk"

    def __post_init__(self) -> None:
        goal_text(1.0, self.template)
        self.check_reward()
        score_columns("", "", self.attributes)
        if self.best is not None:
            named = set(self.best) if isinstance(self.best, dict) else None
            if named != (None if self.attributes is None else set(self.attributes)):
                wanted = "one number" if self.attributes is None else f"a number for each of {[*self.attributes]}"
                raise ValueError(f"best={self.best!r} is not {wanted}.")
            goal_text(self.best, self.template)

    @property
    def columns(self) -> tuple[str, ...]:
        if self.attributes is None:
            return super().columns
        return tuple(dict.fromkeys(name for sides in self.attributes.values() for name in sides))

    @property
    def explicit(self) -> bool:
        return not self.implicit

    def setup(self, run: Run) -> None:
        """The scores were read when the dataset was built; the goals must survive what the trainer cuts off."""
        if run.rows.truncation != "keep_end" or run.arguments.max_length is None or not run.rows.tokenized:
            return
        prompts, *sides = (list_lengths(run.dataset, f"{name}_ids") for name in ("prompt", "chosen", "rejected"))
        cut = int((prompts + np.maximum(*sides) > run.arguments.max_length).sum())
        if cut:
            raise ValueError(
                f"truncation_mode='keep_end' cuts the goal off {cut} of {run.size} pairs, which are longer than "
                f"max_length={run.arguments.max_length}: set truncation_mode='keep_start', or a larger max_length."
            )

    def _system_role(self, run: Run) -> bool:
        return knows_system_role(run.processing_class) if self.system_role is None else self.system_role

    def rebuild(self, run: Run, dataset: Any) -> Any:
        names = self.score_chosen_column, self.score_rejected_column
        if self.scores_itself or self.implicit:
            if self.implicit:
                found = self._implicit_rewards(run)
            else:
                found = dataset_rewards(run, ("chosen", "rejected"), self.reward, self.reward_model)
            together = ranked_scores([*found["chosen"], *found["rejected"]]).round(1)
            dataset = dataset.remove_columns([name for name in names if name in dataset.column_names])
            for name, part in zip(names, (together[: len(dataset)], together[len(dataset) :]), strict=True):
                dataset = dataset.add_column(name, part)
        return build(
            dataset,
            score_chosen=names[0],
            score_rejected=names[1],
            attributes=self.attributes,
            template=self.template,
            system_role=self._system_role(run),
            half=self.half,
            keep_equal=self.keep_equal,
            seed=run.stream_seed("reward_augmented/pairs"),
        )

    @staticmethod
    def _implicit_rewards(run: Run) -> dict[str, np.ndarray]:
        """Log-ratios of policy and reference, of both sides of all pairs."""
        values = run.passes.measure(_log_ratios, description="Implicit rewards")
        if is_constant(values[np.isfinite(values)]):
            raise ValueError(
                "implicit=True scores by what DPO has taught the policy, but here it is its reference: train a policy "
                "that DPO has trained before, and give the model it came from as ref_model."
            )
        return {"chosen": values[:, 0], "rejected": values[:, 1]}

    def rebuild_evaluation(self, run: Run, dataset: Any) -> Any:
        best: Any = self.best
        if best is None:
            goals = run.values("goal")
            best = (
                float(max(goals))
                if self.attributes is None
                else {name: float(max(goal[name] for goal in goals)) for name in self.attributes}
            )
        return condition(dataset, best, template=self.template, system_role=self._system_role(run))


def _log_ratios(batch: Batch) -> Tensor:
    """Implicit rewards of the chosen and the rejected response without beta, `(B, 2)`."""
    assert isinstance(batch, PairBatch)
    return torch.stack(
        [
            batch.policy_chosen_logps - batch.ref_chosen_logps,
            batch.policy_rejected_logps - batch.ref_rejected_logps,
        ],
        dim=1,
    )
