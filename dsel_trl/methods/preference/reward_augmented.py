"""Pairs that are conditioned on the quality that is asked for."""

from dataclasses import dataclass, field
from typing import Any

from ...bases.explicit_margin import ExplicitMargin
from ...core.method import Run
from ...core.registry import register
from ...data.build.reward_augmented import GOAL_TEMPLATE, build, condition, knows_system_role
from ...functional.preference.reward_augmented import goal_text
from ...functional.preference.reward_augmented import implicit_scores as ranked_scores
from ...scorers.rewards import dataset_rewards
from ...signals.batch import Signal


@register("reward_augmented")
@dataclass
class RewardAugmented(ExplicitMargin):
    """
    Makes two pairs of each: whichever response's score the prompt asks for, that response wins.

    What: before training the dataset becomes 2N rows whose prompts ask for a quality (hf.co/papers/2410.08067): a
    system message where the chat template knows one, else the beginning of the user's message or of the plain prompt.
    Scores come from columns or a reward; a reward's are put on the scale 1 to 10 by rank. Pairs whose scores
    contradict their order, or are equal, are left out. `half` augments a random half, so that the number of steps
    stays. Ids are rows of the new dataset. Evaluation data is conditioned on `best` (default: the highest score seen);
    at inference the prompt must ask for it as well ([`~dsel_trl.data.build.reward_augmented.condition`]).
    When: judged pairs whose rejected responses are not all bad. When not: prompts must ask for a quality ever after.
    As files, and for streams: `dsel build reward-augmented`.
    """

    template: str = field(default=GOAL_TEMPLATE, metadata={"help": "text with one slot {g} for the score"})
    system_role: bool | None = field(
        default=None, metadata={"help": "whether the chat template knows a system message; null = find out"}
    )
    half: bool = field(default=False, metadata={"help": "augment a random half of the pairs only"})
    keep_equal: bool = field(default=False, metadata={"help": "keep pairs of equal scores (contradictory)"})
    best: float | None = field(default=None, metadata={"help": "score that evaluation asks for; null = the highest"})

    signals = (Signal.EXPLICIT_MARGIN, Signal.TEXT)
    trainers = ("dpo",)
    paper = "hf.co/papers/2410.08067"
    family = "raw"
    criterion = "external_continuous"
    selector = "builds the dataset"
    cost = "twice the rows and steps (half: as many as before)"
    state = "the dataset, on disk"

    def __post_init__(self) -> None:
        goal_text(1.0, self.template)
        self.check_reward()

    def setup(self, run: Run) -> None:
        """The scores were read when the dataset was built."""

    def _system_role(self, run: Run) -> bool:
        return knows_system_role(run.processing_class) if self.system_role is None else self.system_role

    def rebuild(self, run: Run, dataset: Any) -> Any:
        names = self.score_chosen_column, self.score_rejected_column
        if self.scores_itself:
            found = dataset_rewards(run, ("chosen", "rejected"), self.reward, self.reward_model)
            together = ranked_scores([*found["chosen"], *found["rejected"]]).round(1)
            dataset = dataset.remove_columns([name for name in names if name in dataset.column_names])
            for name, part in zip(names, (together[: len(dataset)], together[len(dataset) :]), strict=True):
                dataset = dataset.add_column(name, part)
        return build(
            dataset,
            score_chosen=names[0],
            score_rejected=names[1],
            template=self.template,
            system_role=self._system_role(run),
            half=self.half,
            keep_equal=self.keep_equal,
            seed=run.stream_seed("reward_augmented/pairs"),
        )

    def rebuild_evaluation(self, run: Run, dataset: Any) -> Any:
        best = self.best if self.best is not None else float(max(run.values("goal")))
        return condition(dataset, best, template=self.template, system_role=self._system_role(run))
