"""Several methods as one."""

from collections.abc import Sequence

import numpy as np

from .method import Method, naming
from .run import Run


class Composition:
    """
    Several methods as one: weights multiply, kept sets intersect, at most one of them orders and one picks.

    Raises:
        `ValueError`: if two methods order, two pick, or two carry the same name.
    """

    def __init__(self, methods: Sequence[Method]) -> None:
        if not methods:
            raise ValueError("No method given: pass one, such as 'uniform'.")
        self.methods = list(methods)
        names = [method.name for method in self.methods]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"The method {name!r} is given twice: their scores would share one column.")
        exclusive = (
            (("order", "plan"), "order the examples"),
            (("batch",), "form the batches"),
            (("batch", "pick"), "form the batches or pick from them"),
            (("rebuild",), "build the dataset"),
        )
        for hooks, verb in exclusive:
            acting = [m.name for m in self.methods if any(hook in m.hooks for hook in hooks)]
            if len(acting) > 1:
                raise ValueError(f"{acting} all {verb}; only one method of a run can. Remove one of them.")
        replacing = [method.name for method in self.methods if method.own_loss]
        if len(replacing) > 1:
            raise ValueError(f"{replacing} each train a loss of their own; only one method of a run can.")

    def using(self, *hooks: str) -> list[Method]:
        """The methods that use one of `hooks`, in the user's order."""
        return [method for method in self.methods if method.hooks & set(hooks)]

    @property
    def candidates(self) -> int:
        """Candidates drawn for one trained example."""
        return max(method.candidates for method in self.methods)

    @property
    def plans(self) -> bool:
        """Whether the run's order is ours; otherwise the trainer's own sampler stays."""
        return bool(self.using("select", "order", "plan", "batch"))

    @property
    def regroups(self) -> bool:
        """Whether other examples come together in a batch than the trainer would put there."""
        return self.plans or self.candidates > 1

    @property
    def carry_over(self) -> bool:
        return any(method.carry_over for method in self.using("plan", "select"))

    @property
    def epochs_are_passes(self) -> bool:
        return any(method.epochs_are_passes for method in self.methods)

    def due(self, run: Run) -> bool:
        """Whether a new plan is due after the step that was just done."""
        return any(method.due(run) for method in self.using("select", "order", "plan", "batch"))

    def kept(self, run: Run) -> np.ndarray:
        """Intersection of the kept sets, `(N,)` bool; the reasons go to the ledger."""
        mask = np.ones(run.size, dtype=bool)
        for method in self.using("select"):
            run.decision = None
            with naming(method):
                kept = method.select(run)
            decision, run.decision = run.decision, None
            if kept is None:
                continue
            if decision is not None:
                # What an earlier method has dropped was not decided here.
                ids = np.flatnonzero(mask)
                run.ledger.decide(method.name, ids, decision.scores[ids], run.step, decision.rule(kept))
            run.ledger.drop(mask & ~kept, method.name)
            mask &= kept
            if not mask.any():
                raise ValueError(f"Nothing is left to train on after {method.name!r} chose: relax its parameters.")
        return mask

    def plan(self, run: Run) -> tuple[np.ndarray, np.ndarray]:
        """The ids that come next in order, and the kept set `(N,)` bool they were taken from."""
        mask = self.kept(run)
        for method in self.using("plan"):
            with naming(method):
                ids = method.plan(run, run.epoch)
            if ids is not None:
                ids = np.asarray(ids, dtype=np.int64)
                return ids[mask[ids]], mask
        unserved = mask.copy()
        unserved[run.served] = False
        ids = np.flatnonzero(unserved if unserved.any() else mask)
        for method in self.using("order"):
            with naming(method):
                return np.asarray(method.order(run, ids), dtype=np.int64), mask
        return run.plan_rng().permutation(ids), mask

    def plan_batches(self, run: Run) -> tuple[list[np.ndarray], np.ndarray]:
        """The plan in micro-batches, and the kept set it was taken from."""
        ids, mask = self.plan(run)
        (method,) = self.using("batch")
        with naming(method):
            return method.batch(run, ids), mask

    def epoch_size(self, run: Run) -> int:
        """Examples per epoch: what one method declares, else the number kept by all of them at the start."""
        declared: list[int] = []
        for method in self.using("select", "order", "plan"):
            with naming(method):
                size = method.epoch_size(run)
            declared += [] if size is None else [size]
        if len(self.using("select", "plan")) <= 1 and declared:
            return min(declared)
        kept = int(self.kept(run).sum())
        return min([kept, *declared])

    def survivors(self, run: Run) -> np.ndarray | None:
        """Which examples later stages may see again, `(N,)` bool: those that all methods leave; `None` = all."""
        left: np.ndarray | None = None
        for method in self.methods:
            with naming(method):
                own = method.survivors(run)
            if own is not None:
                left = own if left is None else left & own
        return left
