"""Methods that follow the live scores of a run at every step: the hardest ones to resume."""

from dataclasses import dataclass, field

import numpy as np

from dsel_trl import Method
from dsel_trl.bases.scored import in_order, known_scores
from dsel_trl.bases.unseen import with_unseen
from dsel_trl.signals.batch import Signal
from dsel_trl.signals.pair_batch import PairBatch
from tests.asking import AsksForAll


@dataclass
class LiveOrder(Method):
    """Plans anew after every step from the scores known by then, weighs by the score, and counts what it saw."""

    refresh: int = 1
    seen: int = field(default=0, init=False)
    sums: np.ndarray | None = field(default=None, init=False)

    name = "live_order"

    def score(self, batch):
        return -batch.implicit_margin if isinstance(batch, PairBatch) else batch.loss

    def order(self, run, ids):
        return in_order(with_unseen(known_scores(run, self.name), run.plan_rng()), ids)

    def weigh(self, batch):
        return (1.0 + 0.1 * (self.seen % 7)) * (0.5 + self.score(batch).sigmoid())

    def observe(self, run, step):
        self.seen += len(step.ids)
        self.sums = np.zeros(run.size, dtype=np.float32) if self.sums is None else self.sums
        np.add.at(self.sums, step.ids, step.values["loss"])
        run.log({"seen": self.seen})

    def state_dict(self):
        return {"seen": self.seen, "sums": self.sums}

    def load_state_dict(self, state):
        self.seen, self.sums = state["seen"], state["sums"].copy()


@dataclass
class LiveHalf(Method):
    """Keeps the half of the examples with the higher live loss, looked at every second step; says no epoch size."""

    refresh: int = 2

    name = "live_half"

    def score(self, batch):
        return batch.loss

    def select(self, run):
        scores = with_unseen(known_scores(run, self.name), run.rng("live_half/unseen"))
        return scores >= np.median(scores)


@dataclass
class LiveThird(LiveHalf):
    """Keeps two thirds by the same score, so that two kept sets intersect."""

    name = "live_third"

    def select(self, run):
        scores = with_unseen(known_scores(run, self.name), run.rng("live_third/unseen"))
        return scores <= np.quantile(scores, 2 / 3)


@dataclass
class PickLongest(Method):
    """Trains on the longest half of twice as many candidates, after looking at their loss."""

    name = "pick_longest"
    signals = (Signal.LOSS,)

    @property
    def candidates(self):
        return 2

    def pick(self, run, candidates):
        lengths, _ = candidates.gather(candidates.lengths.float() + candidates.loss.sigmoid())
        return lengths.argsort(descending=True, stable=True)[: len(lengths) // 2]


@dataclass
class ScoredAtBegin(Method):
    """Measures every example with both models when training begins, and serves the highest first."""

    name = "scored_at_begin"
    trainers = ("dpo", "sft")

    def begin(self, run):
        if not run.resumed:
            run.ledger.write(self.name, None, run.passes.measure(self.measure, tokens=100), run.step)

    def measure(self, batch):
        return batch.policy_chosen_logps - batch.ref_rejected_logps if isinstance(batch, PairBatch) else batch.loss

    def order(self, run, ids):
        return in_order(known_scores(run, self.name), ids)


@dataclass
class ScoredInSetup(ScoredAtBegin):
    """The same one hook earlier: where a sharded model is not in place yet."""

    name = "scored_in_setup"
    setup = ScoredAtBegin.begin
    begin = Method.begin


METHODS = {
    cls.name: cls for cls in (LiveOrder, LiveHalf, LiveThird, PickLongest, ScoredAtBegin, ScoredInSetup, AsksForAll)
}
