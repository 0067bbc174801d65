"""Explicit margins from anywhere: two score columns, a reward function, or a reward model."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..core.charges import Charge
from ..core.method import Method, Run
from ..core.parameters import Reads, When, without
from ..functional.margins import explicit_margin
from ..scorers.rewards import dataset_rewards, load_reward
from ..signals.batch import Batch


def score_reads(*conditions: When) -> dict[str, tuple[When, ...]]:
    """When the parameters of [`ExplicitMargin`] are read, where scores are needed under `conditions` only."""
    columns = (*conditions, without("reward"), without("reward_model"))
    return {
        "score_chosen_column": columns,
        "score_rejected_column": columns,
        "reward": conditions,
        "reward_model": conditions,
    }


@dataclass
class ExplicitMargin(Method):
    """
    A method that knows a score of both responses of a pair: from two dataset columns by default, else from `reward` or
    `reward_model`, which score both responses once before training.
    """

    score_chosen_column: str = field(default="score_chosen", metadata={"help": "score of the chosen response"})
    score_rejected_column: str = field(default="score_rejected", metadata={"help": "score of the rejected response"})
    reward: Any = field(
        default=None,
        metadata={"help": "instead of columns: a function (prompts, responses) -> floats, or 'module:function'"},
    )
    reward_model: str | None = field(
        default=None, metadata={"help": "instead of columns: folder or hub id of a sequence-classification model"}
    )

    charges: ClassVar[tuple[Charge, ...]] = (Charge("rewards", "2", when="reward or reward_model"),)
    cost = "no extra forward"
    reads: ClassVar[Reads] = score_reads()

    @property
    def explicit(self) -> bool:
        """Whether the scores are needed at all with the parameters as they are."""
        return True

    @property
    def scores_itself(self) -> bool:
        """Whether the scores come from a reward, not from columns."""
        return self.reward is not None or self.reward_model is not None

    @property
    def columns(self) -> tuple[str, ...]:
        if not self.explicit or self.scores_itself:
            return ()
        return (self.score_chosen_column, self.score_rejected_column)

    def check_reward(self) -> None:
        """Raises `ValueError` if the reward cannot be; to be called when the parameters are validated."""
        if self.reward is not None and self.reward_model is not None:
            raise ValueError(f"reward={self.reward!r} and reward_model={self.reward_model!r}: give one of them.")
        if self.reward is not None:
            load_reward(self.reward)
        self._rewards: np.ndarray | None = None

    def setup(self, run: Run) -> None:
        if not (self.explicit and self.scores_itself):
            return
        names = [f"{self.name}_reward_{side}" for side in ("chosen", "rejected")]
        if not run.resumed:
            if run.size == 0:
                raise ValueError(f"{self.name!r}: a stream cannot be scored before training; give score columns.")
            found = dataset_rewards(run, ("chosen", "rejected"), self.reward, self.reward_model)
            for name, side in zip(names, ("chosen", "rejected"), strict=True):
                run.ledger.write(name, None, found[side], step=0)
        self._rewards = np.stack([run.ledger[name] for name in names])

    def explicit_scores(self, run: Run) -> tuple[np.ndarray, np.ndarray]:
        """Scores of the chosen and of the rejected responses, `(N,)` each; NaN = missing."""
        if self._rewards is not None:
            return self._rewards[0], self._rewards[1]
        return run.column(self.score_chosen_column), run.column(self.score_rejected_column)

    def explicit_margin(self, run: Run) -> np.ndarray:
        """Explicit margins of all pairs, `(N,)`; NaN where a score is missing."""
        chosen, rejected = self.explicit_scores(run)
        margin = chosen - rejected
        return np.where(np.isfinite(margin), margin, np.nan)

    def batch_scores(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Scores of both responses of a batch's pairs, `(B,)` each."""
        if self._rewards is None:
            return batch.column(self.score_chosen_column), batch.column(self.score_rejected_column)
        rows = torch.from_numpy(self._rewards[:, batch.ids.cpu().numpy()]).to(batch.ids.device)
        return rows[0], rows[1]

    def batch_margin(self, batch: Batch) -> Tensor:
        """Explicit margins of a batch's pairs, `(B,)`."""
        return explicit_margin(*self.batch_scores(batch))
