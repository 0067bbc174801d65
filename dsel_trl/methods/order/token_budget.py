"""Batches of like lengths, with a budget in tokens instead of a number of examples."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...bases.batch_forming import Batched
from ...core.parameters import check_whole
from ...core.registry import register
from ...core.run import Run
from ...functional.order.token_budget import budget_starts, sorted_windows
from ...sampling.batch_sampler import over_ranks
from ...signals.batch import Signal

# What is sorted together: many batches, so that they are alike, but not all, so that no two passes are.
SHUFFLED_WINDOW, SHUFFLED_STEPS = 1024, 128
# With an order to keep to, lengths are only sorted among this many optimizer steps' worth of neighbours.
ORDERED_STEPS = 8
# How many passes are looked at to find an epoch length that fits them all.
PASSES_AHEAD = 16


@register("token_budget")
@dataclass
class TokenBudget(Batched):
    """
    Puts examples of like length into a batch and fills it up to a number of tokens: hardly any padding.

    What: the planned order is cut into windows, each is sorted by length and cut into batches of at most `tokens`
    padded tokens (a pair counts as two sequences, each as long as the longer one); the batches are shuffled. Every
    example comes exactly once per pass, and all passes have the same number of batches. It goes with any other method:
    kept sets are batched as they are, and where a method orders the examples the windows follow that order (batches
    are shuffled inside a window only).
    Weights: DPO averages over the pairs of a batch, so a pair in a small batch would count for more. By default
    (`weighting: pair`) the gradient is put right exactly: every pair counts the same in the whole pass; where
    `max_grad_norm` clips every step, clipping undoes it. The logged `loss` stays TRL's. SFT averages over the tokens
    of an optimizer step, and needs no correction.
    When: lengths differ. Share of real tokens in batches of 8, random order -> this: web documents cut at 4,096
    0.31 -> 0.98, pairs 0.40 -> 0.89 (hh-harmless) and 0.50 -> 0.78 (alpaca-eval; the rest is chosen padded against
    rejected). An epoch keeps about its number of steps.
    When not: methods that need batches of a fixed number (`pick`); lengths that hardly differ; padding-free training,
    which has no padding to save.
    Cost of a plan of 1,000,000 examples on one core (`benchmarks/scale.py`): 1-2 seconds and 52 MB; the first plan,
    which also finds the budget and looks ahead, 5 seconds.
    """

    tokens: int | None = field(
        default=None,
        metadata={
            "help": "padded tokens per batch and device; default: so many that an epoch keeps its number of steps"
        },
    )
    window: int | None = field(
        default=None,
        metadata={
            "help": "examples sorted together; default 128 micro-steps (1024 at least), where a method orders 8 steps"
        },
    )
    max_examples: int | None = field(default=None, metadata={"help": "largest number of examples in a batch"})
    signals = (Signal.LENGTH,)
    selector = "all, in batches of like length"
    state = "none"

    def __post_init__(self) -> None:
        for name in ("tokens", "window", "max_examples"):
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name), 1, 2**62)
        super().__post_init__()
        self._lengths, self._rows = np.empty(0, dtype=np.int32), 1
        self._budget, self._examples, self._steps = 1, 0, 0

    def check(self, run: Run) -> None:
        self._lengths, self._rows = run.rows.padded_lengths, run.rows.layout.sequences
        self._examples = 0

    def batch(self, run: Run, ids: np.ndarray) -> list[np.ndarray]:
        if not run.ordered:
            ids = _shuffled(run, ids, run.plans_made)
        if not self._examples:
            self._budget = self.tokens or self._usual_budget(run, ids)
        order, starts = self._cut(run, ids)
        sizes = np.diff(np.append(starts, len(order)))
        if not self._examples:
            self._examples, self._steps = len(ids), self._most_steps(run, ids, len(starts))
            self.mean_size = len(ids) / (self._steps * run.world)
        if len(ids) == self._examples:
            starts = _split_largest(starts, sizes, self._steps - len(starts), run.world)
        rng = run.rng("token_budget/batches", run.plans_made, run.epoch)
        shuffled = rng.permutation(len(starts))
        if run.ordered:
            windows = starts // self._window(run, len(order))
            shuffled = shuffled[np.argsort(windows[shuffled], kind="stable")]
        bounds = np.append(starts, len(order)).tolist()
        return over_ranks([order[bounds[i] : bounds[i + 1]] for i in shuffled.tolist()], run.world)

    def _window(self, run: Run, examples: int) -> int:
        batch, accumulation = run.arguments.per_device_train_batch_size, run.arguments.gradient_accumulation_steps
        usual = max(SHUFFLED_WINDOW, SHUFFLED_STEPS * batch * run.world)
        if run.ordered:
            usual = ORDERED_STEPS * batch * accumulation * run.world
        window = self.window or usual
        # Equal windows, as a short last one would be batched badly; whole shares for all ranks in each of them.
        window = -(-examples // -(-examples // window))
        return -(-window // run.world) * run.world

    def _cut(self, run: Run, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The ids, sorted in windows, and where each micro-step (one batch per rank) starts."""
        window = self._window(run, len(ids))
        order = ids[sorted_windows(self._lengths[ids], np.arange(len(ids)), window)]
        starts = budget_starts(
            self._lengths[order],
            self._budget,
            window,
            rows_per_example=self._rows,
            max_examples=self.max_examples,
            ranks=run.world,
        )
        return order, starts

    def _usual_budget(self, run: Run, ids: np.ndarray) -> int:
        """The budget with which a pass has about as many micro-steps as with batches of the user's size."""
        size, lengths = run.arguments.per_device_train_batch_size, self._lengths[ids].astype(np.float64)
        most, wanted = size * self._rows * float(lengths.max()), len(ids) / (size * run.world)
        budget, tried = size * self._rows * float(lengths.mean()), []
        for _ in range(4):
            # What does not fit into a batch any more is room left empty: the more of it, the larger the budget.
            self._budget = max(1, round(min(budget, most)))
            steps = len(self._cut(run, ids)[1])
            tried.append((abs(steps - wanted), self._budget))
            budget *= steps / wanted
        return min(tried)[1]

    def _most_steps(self, run: Run, ids: np.ndarray, steps: int) -> int:
        """Most micro-steps that any pass over the same ids will need: what all of them are brought to."""
        if run.ordered:
            return steps
        passes = min(PASSES_AHEAD, int(np.ceil(run.epochs)))
        ahead = [len(self._cut(run, _shuffled(run, ids, run.plans_made + i))[1]) for i in range(1, passes)]
        return max([steps, *ahead])

    def state_dict(self) -> dict[str, Any]:
        own = {"budget": self._budget, "examples": self._examples, "steps": self._steps}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._budget, self._examples, self._steps = (int(state[name]) for name in ("budget", "examples", "steps"))


def _shuffled(run: Run, ids: np.ndarray, plan: int) -> np.ndarray:
    """A random order that is known before its pass comes."""
    return run.rng("token_budget/order", plan).permutation(np.sort(ids))


def _split_largest(starts: np.ndarray, sizes: np.ndarray, more: int, ranks: int) -> np.ndarray:
    """Cuts the micro-steps with the most examples in two, so that there are `more` of them."""
    if more <= 0:
        return starts
    largest = np.argsort(-sizes, kind="stable")[:more]
    largest = largest[sizes[largest] >= 2 * ranks]
    return np.sort(np.append(starts, starts[largest] + sizes[largest] // ranks // 2 * ranks))
