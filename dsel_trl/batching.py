"""Plans made of batches: length buckets and token budgets, where the batch size varies from step to step."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np


class BatchPlanSampler:
    """
    Serves planned batches to one rank, asks again when the plan is due or used up, and remembers what it handed out.

    A plan is a list of batches whose number is a multiple of `world`; `world` consecutive ones make one micro-step,
    one batch per rank. An epoch has `length` micro-steps; an unfinished plan goes on in the next epoch, so no example
    is lost where the plans of two epochs differ in length.

    Args:
        plan (`Callable[[np.ndarray, int], list[np.ndarray]]`):
            Called with the ids handed out so far in this epoch and the number of plans made so far in the run.
        length (`int`):
            Micro-steps per epoch.
        rank, world (`int`):
            This process and their number.
    """

    def __init__(
        self, plan: Callable[[np.ndarray, int], Sequence[np.ndarray]], length: int, rank: int = 0, world: int = 1
    ) -> None:
        if length < 1:
            raise ValueError(f"An epoch of {length} batches cannot be served.")
        self.plan, self.length, self.rank, self.world = plan, length, rank, world
        self.plans_made = 0
        self.due = False
        self._queue: list[np.ndarray] = []
        self._history: list[np.ndarray] = []
        self._replay = False

    def __len__(self) -> int:
        return self.length

    @property
    def history(self) -> np.ndarray:
        """Ids handed out in this epoch to all ranks, in order."""
        return np.concatenate(self._history) if self._history else np.empty(0, dtype=np.int64)

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
        if self.due or not self._queue:
            batches = [np.asarray(batch, dtype=np.int64) for batch in self.plan(self.history, self.plans_made)]
            self.plans_made += 1
            self.due = False
            if not batches:
                raise ValueError("The plan is empty: no example is left to train on.")
            if len(batches) % self.world:
                raise ValueError(f"A plan of {len(batches)} batches does not go evenly over {self.world} processes.")
            self._queue = batches[::-1]
        group = [self._queue.pop() for _ in range(self.world)]
        self._history += group
        return group

    def state_dict(self, mid_epoch: bool) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """State after a step; between epochs the finished history is left out, for it must not be replayed."""
        arrays: dict[str, np.ndarray] = {}
        parts = {"history": self._history if mid_epoch else [], "queue": self._queue[::-1]}
        for name, batches in parts.items():
            arrays[name] = np.concatenate(batches) if batches else np.empty(0, dtype=np.int64)
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
        self._queue = batches("queue")[::-1]
        self._replay = bool(values["mid_epoch"]) and replay
        self._history = batches("history") if self._replay else []


def even_over_ranks(batches: list[np.ndarray], world: int) -> list[np.ndarray]:
    """
    The same examples in a number of batches that is a multiple of `world`, in the same order.

    The examples of the last, incomplete group are spread over all ranks; where there are fewer examples than ranks,
    the first of them is repeated.
    """
    rest = len(batches) % world
    if not rest:
        return batches
    ids = np.concatenate(batches[-rest:])
    if len(ids) < world:
        ids = np.concatenate([ids, np.repeat(ids[:1], world - len(ids))])
    return [*batches[:-rest], *np.array_split(ids, world)]
