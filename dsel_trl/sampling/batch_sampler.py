"""Plans made of batches: length buckets and token budgets, where the batch size varies from step to step."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from .pass_ends import PassEnds, joined


class BatchPlanSampler:
    """
    Serves planned batches to one rank, asks again when the plan is due or used up, and remembers what it handed out.

    A plan is a list of batches whose number is a multiple of `world`; `world` consecutive ones make one micro-step,
    one batch per rank. It is a pass over the data, and a pass is not cut by the end of an epoch: an epoch has `length`
    micro-steps, and an unfinished pass goes on in the next one, so no example is lost where passes differ in length.

    Args:
        plan (`Callable[[np.ndarray, int], list[np.ndarray]]`):
            Called with the ids handed out so far in this pass (none when a new one begins) and the number of plans
            made so far in the run.
        length (`int`):
            Micro-steps per epoch.
        rank, world (`int`):
            This process and their number.
        accumulation (`int`, *optional*, defaults to `1`):
            Micro-steps per optimizer step: a plan that replaces an unfinished one begins with an optimizer step.
    """

    def __init__(
        self,
        plan: Callable[[np.ndarray, int], Sequence[np.ndarray]],
        length: int,
        rank: int = 0,
        world: int = 1,
        accumulation: int = 1,
    ) -> None:
        if length < 1:
            raise ValueError(f"An epoch of {length} batches cannot be served.")
        self.plan, self.length, self.rank, self.world, self.accumulation = plan, length, rank, world, accumulation
        self.plans_made = 0
        self.due = False
        self.passes = PassEnds()
        self._queue: list[np.ndarray] = []
        self._history: list[np.ndarray] = []
        self._served: list[np.ndarray] = []
        self._replay = False

    def __len__(self) -> int:
        return self.length

    @property
    def history(self) -> np.ndarray:
        """Ids handed out in this epoch to all ranks, in order."""
        return joined(self._history)

    def __iter__(self) -> Iterator[list[int]]:
        if self._replay:
            self._replay = False
            for start in range(0, len(self._history), self.world):
                yield self._history[start + self.rank].tolist()
        else:
            self._history = []
        while len(self._history) < self.length * self.world:
            yield self._draw()[self.rank].tolist()

    def _draw(self) -> list[np.ndarray]:
        whole_step = len(self._history) // self.world % self.accumulation == 0
        if not self._queue or (self.due and whole_step):
            anew, waiting = not self._queue, sum(map(len, self._queue))
            if anew:
                self._served = []
            batches = [np.asarray(batch, dtype=np.int64) for batch in self.plan(joined(self._served), self.plans_made)]
            self.plans_made += 1
            self.due = False
            if not batches:
                raise ValueError("The plan is empty: no example is left to train on.")
            if len(batches) % self.world:
                raise ValueError(f"A plan of {len(batches)} batches does not go evenly over {self.world} processes.")
            self.passes.planned(sum(map(len, batches)), waiting, anew)
            self._queue = batches[::-1]
        group = [self._queue.pop() for _ in range(self.world)]
        self._history += group
        self._served += group
        return group

    def state_dict(self, mid_epoch: bool) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """State after a step; between epochs the finished history is left out, for it must not be replayed."""
        arrays: dict[str, np.ndarray] = {"passes": self.passes.array}
        history = self._history if mid_epoch else []
        for name, batches in (("history", history), ("queue", self._queue[::-1]), ("served", self._served)):
            arrays[name] = joined(batches)
            arrays[f"{name}_sizes"] = np.array([len(batch) for batch in batches], dtype=np.int64)
        values = {"plans_made": self.plans_made, "due": self.due, "length": self.length, "mid_epoch": mid_epoch}
        return arrays, values

    def load_state_dict(self, arrays: dict[str, np.ndarray], values: dict[str, Any], replay: bool) -> None:
        """Takes back what `state_dict` gave; `replay=False` starts a new epoch (the trainer does not skip)."""
        if values["length"] != self.length:
            raise ValueError(
                f"The checkpoint was made with {values['length']} batches per epoch, this run has {self.length}."
            )

        def batches(name: str) -> list[np.ndarray]:
            return np.split(arrays[name], np.cumsum(arrays[f"{name}_sizes"])[:-1]) if len(arrays[name]) else []

        self.plans_made, self.due = int(values["plans_made"]), bool(values["due"])
        self._queue, self._served = batches("queue")[::-1], batches("served")
        self.passes = PassEnds(arrays["passes"])
        self._replay = bool(values["mid_epoch"]) and replay
        self._history = batches("history") if self._replay else []


def over_ranks(micro_steps: Sequence[np.ndarray], ranks: int) -> list[np.ndarray]:
    """
    Each micro-step's ids in `ranks` batches of equal number, in the same order.

    DPOTrainer gathers its metrics by example, so all ranks need as many. Where the ids do not go evenly over the ranks
    the first ones are repeated, as the trainer's own loader does; a planner makes this rare.
    """
    if ranks == 1:
        return list(micro_steps)
    return [part for ids in micro_steps for part in np.split(np.resize(ids, -(-len(ids) // ranks) * ranks), ranks)]
