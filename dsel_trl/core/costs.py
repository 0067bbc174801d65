"""What selection adds to a run: forwards, backwards, generated tokens, helper runs and seconds, in one place."""

import contextlib
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

# What is counted in examples and in tokens, and the key of the tokens. A pair is one example of two sequences. What
# the trainer does anyway is not counted: training forwards, their reference, evaluations.
WORK = {
    "forwards": "forward_tokens",
    "backwards": "backward_tokens",
    "reference_forwards": "reference_forward_tokens",
    "scorer_forwards": "scorer_forward_tokens",
    "helper_forwards": "helper_forward_tokens",
    "helper_reference_forwards": "helper_reference_forward_tokens",
    "helper_backwards": "helper_backward_tokens",
    "generated_responses": "generated_tokens",
    "prompts": "prompt_tokens",
    "rewards": "reward_tokens",
}
# Responses that a cap on their tokens has cut off are among the generated ones.
EVENTS = ("helper_runs", "helper_steps", "cut_responses")


def all_forwards(cost: Mapping[str, Any]) -> int:
    """Examples through any model, of a run's `cost` in `summary.json`; those that helpers train on among them."""
    return sum(cost.get(what, 0) for what in WORK if what.endswith("forwards"))


class Costs:
    """
    Counts what a run's selection adds, over all processes and each example once; a resumed run counts on.

    `forwards` are those of the policy beside its training, `backwards` their backward passes (a target's gradient, a
    loss that is added), `scorer_forwards` those of another model (a scorer, a sentence encoder, a second opinion),
    `helper_*` those of models trained beside the run, their training included. `seconds` are those of the first
    process, since it began or took up the run.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.seconds = 0.0
        self._collected: Counter[str] | None = None
        self._clocks = 0

    def add(self, what: str, examples: float, tokens: float = 0) -> None:
        """`examples` of all processes went through `what`, a name of `WORK` or `EVENTS`."""
        if what not in WORK and what not in EVENTS:
            raise ValueError(f"{what!r} is none of {[*WORK, *EVENTS]}.")
        self.counts[what] += round(examples)
        if what in WORK:
            self.counts[WORK[what]] += round(tokens)

    def ran(self, what: str, examples: int, tokens: int) -> None:
        """One batch of this process went through `what`; inside of `collecting`, who collects knows the others'."""
        if self._collected is None:
            self.add(what, examples, tokens)
        else:
            self._collected[what] += 1

    @contextlib.contextmanager
    def collecting(self) -> Iterator[Counter[str]]:
        """Gives how often a batch went through what, for a caller that adds it up over all batches and processes."""
        before, self._collected = self._collected, Counter()
        try:
            yield self._collected
        finally:
            self._collected = before

    def add_all(self, times: Mapping[str, int], examples: float, tokens: float) -> None:
        """`examples` went through everything that `collecting` gave, as often as it says."""
        for what, often in times.items():
            self.add(what, often * examples, often * tokens)

    @contextlib.contextmanager
    def clock(self) -> Iterator[None]:
        """Counts the seconds inside, once where clocks are nested."""
        started, self._clocks = time.perf_counter(), self._clocks + 1
        try:
            yield
        finally:
            self._clocks -= 1
            if not self._clocks:
                self.seconds += time.perf_counter() - started

    def summary(self, size: int) -> dict[str, Any]:
        """What `summary.json` says: all counts, seconds, and, where the dataset has a `size`, what falls to a row."""
        names = [name for pair in WORK.items() for name in pair]
        found: dict[str, Any] = {name: self.counts[name] for name in (*names, *EVENTS)}
        found["seconds"] = round(self.seconds, 3)
        if size:
            found["per_example"] = {what: round(self.counts[what] / size, 4) for what in WORK if self.counts[what]}
        return found

    def state_dict(self) -> dict[str, Any]:
        """
        JSON values for the checkpoint, without the seconds: what a clock says would make two checkpoints of the same
        run different, and the seconds of a process that was killed are gone anyway.
        """
        return {"counts": dict(sorted(self.counts.items()))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.counts = Counter(state["counts"])

    def reset(self) -> None:
        """Begins anew, with another run."""
        self.counts, self.seconds = Counter(), 0.0
