"""Serving a plan: order, history, resume."""

from collections.abc import Callable, Iterator

import numpy as np
from torch.utils.data import Sampler

from .pass_ends import PassEnds, joined


class PlanSampler(Sampler[int]):
    """
    Serves ids in planned order, asks again when the plan is due or used up, and remembers what it has handed out.

    An epoch always has `length` ids, so that the learning-rate schedule stays right. A plan that is shorter is asked
    for again; one that is longer is cut. The ids of one global micro-batch (`block`) are drawn together: they are in
    the history as soon as the first of them is handed out.

    Args:
        plan (`Callable[[np.ndarray, int], np.ndarray]`):
            Called with the ids handed out so far in this epoch (with `carry_over`: in this pass) and the number of
            plans made so far in the run; returns the ids that come next, in order. It decides itself whether to repeat
            an id.
        length (`int`):
            Ids per epoch.
        block (`int`):
            Ids drawn at a time: the examples of one micro-batch over all ranks.
        carry_over (`bool`, *optional*, defaults to `False`):
            Whether an unfinished plan continues in the next epoch instead of being replaced. A pass then begins
            where a plan was used up, and not with an epoch.
    """

    def __init__(
        self, plan: Callable[[np.ndarray, int], np.ndarray], length: int, block: int, carry_over: bool = False
    ) -> None:
        if length < 1:
            raise ValueError(f"An epoch of {length} examples cannot be served.")
        self.plan = plan
        self.length = length
        self.block = block
        self.carry_over = carry_over
        self.plans_made = 0
        self.due = False
        self.passes = PassEnds()
        self._queue = np.empty(0, dtype=np.int64)
        self._served: list[np.ndarray] = []
        self._history = np.empty(length, dtype=np.int64)
        self._count = 0
        self._replay = False

    def __len__(self) -> int:
        return self.length

    @property
    def history(self) -> np.ndarray:
        """Ids handed out in this epoch, in order."""
        return self._history[: self._count]

    def __iter__(self) -> Iterator[int]:
        if self._replay:
            # The trainer skips what was trained; the ids it had already fetched ahead come again unchanged.
            self._replay = False
            yield from self.history.tolist()
        else:
            self._count = 0
            if not self.carry_over:
                self._queue = self._queue[:0]
        while self._count < self.length:
            yield from self._draw().tolist()

    def _draw(self) -> np.ndarray:
        if self.due or not len(self._queue):
            anew, waiting = not len(self._queue), len(self._queue)
            if anew:
                self._served = []
            served = joined(self._served) if self.carry_over else self.history
            self._queue = np.asarray(self.plan(served, self.plans_made), dtype=np.int64)
            self.passes.planned(len(self._queue), waiting, anew)
            self.plans_made += 1
            self.due = False
            if not len(self._queue):
                raise ValueError("The plan is empty: no example is left to train on.")
        size = min(self.block, self.length - self._count, len(self._queue))
        ids, self._queue = self._queue[:size], self._queue[size:]
        self._history[self._count : self._count + size] = ids
        self._count += size
        if self.carry_over:
            self._served.append(ids)
        return ids

    def state_dict(self, mid_epoch: bool) -> tuple[dict[str, np.ndarray], dict[str, int | bool]]:
        """State after a step; between epochs the finished history is left out, for it must not be replayed."""
        history = self.history if mid_epoch else self.history[:0]
        queue = self._queue if mid_epoch or self.carry_over else self._queue[:0]
        values = {"plans_made": self.plans_made, "due": self.due, "length": self.length, "mid_epoch": mid_epoch}
        arrays = {"history": history, "queue": queue, "pass": joined(self._served), "passes": self.passes.array}
        return arrays, values

    def load_state_dict(self, arrays: dict[str, np.ndarray], values: dict[str, int | bool], replay: bool) -> None:
        """Takes back what `state_dict` gave; `replay=False` starts a new epoch (the trainer does not skip)."""
        if values["length"] != self.length:
            raise ValueError(
                f"The checkpoint was made with {values['length']} examples per epoch, this run has {self.length}."
            )
        self.plans_made, self.due = int(values["plans_made"]), bool(values["due"])
        self._queue = arrays["queue"].astype(np.int64)
        self._served, self.passes = [arrays["pass"].astype(np.int64)], PassEnds(arrays["passes"])
        self._replay = bool(values["mid_epoch"]) and replay
        self._count = len(arrays["history"]) if self._replay else 0
        self._history[: self._count] = arrays["history"][: self._count]
