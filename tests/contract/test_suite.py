"""The contract suite itself: methods that do nothing, or let the unknown win, must not pass it."""

import runpy
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from dsel_trl import Method, register
from dsel_trl.core import registry
from dsel_trl.signals.batch import Signal
from tests.contract import cases
from tests.contract.checks import acting, assert_acts, assert_idle, assert_unknown_displaces_nothing


class OnlyADocstring(Method):
    """A card and no hooks."""

    name = "toy"


class ScoresOnly(Method):
    """Measures, and does nothing about it."""

    name = "toy"

    def score(self, batch):
        return -batch.loss


class WeighsAlike(Method):
    """Every example the same weight."""

    name = "toy"

    def weigh(self, batch):
        return torch.full((batch.size,), 0.7)


class WeighsOnes(Method):
    """The weight 1 for every example, and no average to divide by."""

    name = "toy"
    normalize = "none"

    def weigh(self, batch):
        return torch.ones(batch.size)


class AdjustsNothing(Method):
    """The beta that the trainer has."""

    name = "toy"

    def adjust(self, run, batch):
        return {} if run.trainer == "sft" else {"beta": batch.settings.beta}


class AddsNothing(Method):
    """A loss of zero."""

    name = "toy"

    def extra_loss(self, run, batch):
        return 0.0 * next(run.model.parameters()).sum()


class SelectsAll(Method):
    """Keeps all."""

    name = "toy"

    def select(self, run):
        return np.ones(run.size, dtype=bool)


class SelectsAllOfAShorterEpoch(SelectsAll):
    """Keeps all, and serves the half of it that comes first."""

    refresh = 2

    def epoch_size(self, run):
        return run.size // 2


class Shuffles(Method):
    """An order of its own, drawn at random."""

    name = "toy"

    def order(self, run, ids):
        return run.plan_rng("toy/order").permutation(ids)


class PlansAll(Method):
    """Every example once, drawn at random."""

    name = "toy"

    def plan(self, run, epoch):
        return run.rng("toy/plan", epoch).permutation(run.size)


class BatchesAsUsual(Method):
    """Batches of the trainer's size, cut from a random order."""

    name = "toy"

    def batch(self, run, ids):
        size = run.arguments.per_device_train_batch_size
        return np.split(ids, range(size, len(ids), size))


class PicksTheFirst(Method):
    """The first half of twice as many candidates."""

    name = "toy"

    @property
    def candidates(self):
        return 2

    def pick(self, run, candidates):
        return torch.arange(max(1, candidates.size // 2))


class PicksAtRandom(PicksTheFirst):
    """A random half of twice as many candidates."""

    def pick(self, run, candidates):
        order = run.rng("toy/pick", run.step, candidates.size).permutation(candidates.size)
        return torch.as_tensor(order[: max(1, candidates.size // 2)])


class RebuildsTheSame(Method):
    """The same rows in another order."""

    name = "toy"

    def rebuild(self, run, dataset):
        columns = [name for name in dataset.column_names if not name.endswith("ids")]
        return dataset.select_columns(columns).select(run.rng("toy/rebuild").permutation(len(dataset)))


IDLE = (
    OnlyADocstring,
    ScoresOnly,
    WeighsAlike,
    WeighsOnes,
    AdjustsNothing,
    AddsNothing,
    SelectsAll,
    SelectsAllOfAShorterEpoch,
    Shuffles,
    PlansAll,
    BatchesAsUsual,
    PicksTheFirst,
    PicksAtRandom,
    RebuildsTheSame,
)


def check_acts(bench, method, kind="dpo"):
    assert_acts(bench.run(bench.trainer(kind), method), bench.stock(kind), bench.shuffled(kind))


@pytest.mark.parametrize("toy", IDLE)
def test_a_method_that_does_nothing_fails(bench, toy):
    with pytest.raises(AssertionError, match="'toy' does nothing"):
        check_acts(bench, toy())


@pytest.mark.parametrize("toy", [OnlyADocstring, SelectsAll])
def test_a_method_that_does_nothing_fails_on_sequences_too(bench, toy):
    with pytest.raises(AssertionError, match="'toy' does nothing"):
        check_acts(bench, toy(), "sft")


@pytest.fixture
def registered(monkeypatch):
    """A method that is registered for the time of a test, without a case of its own."""
    monkeypatch.setattr(registry, "_REGISTRY", {**registry._REGISTRY})

    @register("toy_without_hooks")
    @dataclass
    class Registered(Method):
        """A card and no hooks."""

    return Registered.name


def test_a_registered_method_is_in_the_suite_and_has_to_act(bench, registered):
    table = runpy.run_path(cases.__file__)
    assert {(registered, "dpo"), (registered, "sft")} <= set(table["EVERYWHERE"])
    run = bench.whole(registered, "dpo")
    with pytest.raises(AssertionError, match="'toy_without_hooks' does nothing"):
        assert_acts(run, bench.stock("dpo", registered), bench.shuffled("dpo", registered))


# ---- What acts in the smallest way passes ----


class DropsOne(SelectsAll):
    """All but one example."""

    def select(self, run):
        return np.arange(run.size) != 3


class Reverses(Method):
    """The rows from the last to the first."""

    name = "toy"

    def order(self, run, ids):
        return np.sort(ids)[::-1]


class PrefersALittle(Method):
    """Nearly at random: long examples come somewhat earlier."""

    name = "toy"

    def order(self, run, ids):
        noise = run.plan_rng().standard_normal(len(ids))
        return ids[np.argsort(noise - run.lengths[ids] / run.lengths.std())]


class BatchesOfLikeLength(BatchesAsUsual):
    """Batches of the trainer's size whose examples are alike, in random order."""

    def batch(self, run, ids):
        batches = super().batch(run, ids[np.argsort(run.lengths[ids], kind="stable")])
        return [batches[i] for i in run.plan_rng().permutation(len(batches))]


class PicksTheLong(PicksTheFirst):
    """The longer half of the candidates."""

    def pick(self, run, candidates):
        return candidates.lengths.argsort(descending=True, stable=True)[: max(1, candidates.size // 2)]


class WeighsOneStep(Method):
    """Other weights than 1 on a plan that is no decision."""

    name = "toy"

    def select(self, run):
        return np.ones(run.size, dtype=bool)

    def weigh(self, batch):
        return 1.0 + (batch.ids % 2)


class SelectsAllAndAdjusts(SelectsAll):
    """Another beta on a plan that is no decision."""

    def adjust(self, run, batch):
        return {"beta": 2 * batch.settings.beta}


class PlansTwice(Method):
    """One example twice."""

    name = "toy"

    def plan(self, run, epoch):
        return np.append(3, run.plan_rng().permutation(run.size))


class RebuildsLess(RebuildsTheSame):
    """The same rows, but one."""

    def rebuild(self, run, dataset):
        return super().rebuild(run, dataset).select(range(len(dataset) - 1))


@pytest.mark.parametrize(
    ("toy", "by"),
    [
        (DropsOne, "kept"),
        (PlansTwice, "kept"),
        (Reverses, "order"),
        (PrefersALittle, "order"),
        (BatchesOfLikeLength, "order"),
        (PicksTheLong, "picked"),
        (WeighsOneStep, "gradients"),
        (SelectsAllAndAdjusts, "gradients"),
        (RebuildsLess, "rows"),
    ],
)
def test_the_least_that_counts_as_acting(bench, toy, by):
    run = bench.run(bench.trainer("dpo"), toy())
    assert acting(run, bench.stock("dpo"), bench.shuffled("dpo")) == by


def test_the_control_is_the_only_method_that_may_be_idle():
    assert {name for name in cases.GUISES if cases.case(name).idle} == {"uniform"}


def test_a_method_that_acts_is_not_idle(bench):
    run = bench.run(bench.trainer("dpo"), DropsOne())
    with pytest.raises(AssertionError):
        assert_idle(run, bench.stock("dpo"))


# ---- Unknown scores ----


class Scored(Method):
    """Scores by the loss."""

    name = "toy"

    def score(self, batch):
        return batch.loss

    def known(self, run):
        run.ledger.add(self.name)
        return run.ledger[self.name]


class NaNIsKept(Scored):
    """Keeps the last of an ascending sort, where NaN is last."""

    def select(self, run):
        mask = np.zeros(run.size, dtype=bool)
        mask[np.argsort(self.known(run), kind="stable")[-run.size // 2 :]] = True
        return mask


class NaNComesFirst(Scored):
    """Serves from the highest score to the lowest, NaN before all."""

    def order(self, run, ids):
        return ids[np.argsort(self.known(run)[ids], kind="stable")[::-1]]


class NaNIsPlanned(Scored):
    """Plans the half with the highest scores, NaN before all."""

    def plan(self, run, epoch):
        return np.argsort(self.known(run), kind="stable")[::-1][: run.size // 2]


class NaNIsAverage(Scored):
    """Keeps the higher half, where what was measured in vain has a random value."""

    def select(self, run):
        scores = self.known(run)
        known = np.isfinite(scores)
        if known.any():
            scores = np.where(known, scores, run.plan_rng().choice(scores[known], len(scores)))
        return np.nan_to_num(scores) >= np.median(np.nan_to_num(scores))


class NaNWeighsMost(Scored):
    """Weighs by the score, and what is unknown most of all."""

    def weigh(self, batch):
        return torch.nan_to_num(self.score(batch), nan=100.0)


class NaNIsPicked(PicksTheFirst):
    """Picks the highest losses of twice as many candidates; a descending sort has NaN first."""

    signals = (Signal.LOSS,)

    def pick(self, run, candidates):
        return candidates.loss.argsort(descending=True)[: max(1, candidates.size // 2)]


class EmptyColumnWins(Scored):
    """Keeps the highest values of a column, where an empty one counts as the highest."""

    columns = ("difficulty",)

    def select(self, run):
        values = np.nan_to_num(run.column("difficulty"), nan=np.inf)
        return values >= np.quantile(values, 0.5, method="higher")


@pytest.mark.parametrize(
    ("toy", "match"),
    [
        (NaNIsKept, "of which nothing is known, and not"),
        (NaNComesFirst, "begins with"),
        (NaNIsPlanned, "of which nothing is known"),
        (NaNIsAverage, "of which nothing is known, and not"),
        (NaNWeighsMost, "of which nothing is known, with"),
        (NaNIsPicked, "pick .* takes"),
        (EmptyColumnWins, "of which nothing is known, and not"),
    ],
)
def test_a_method_whose_unknown_scores_win_fails(bench, toy, match):
    run, gaps = bench.gappy("dpo", toy())
    assert gaps.used
    with pytest.raises(AssertionError, match=match):
        assert_unknown_displaces_nothing(run)


class NaNComesLast(Scored):
    """Serves from the highest score to the lowest, what is unknown at the end."""

    def order(self, run, ids):
        return ids[np.argsort(-self.known(run)[ids], kind="stable")]


def test_unknown_scores_that_come_last_pass(bench):
    run, gaps = bench.gappy("dpo", NaNComesLast())
    assert gaps.used
    assert any(plan.unknown.any() for plan in run.decisions.plans)
    assert_unknown_displaces_nothing(run)


def test_a_method_that_looks_at_no_measurement_has_nothing_unknown(bench):
    _, gaps = bench.gappy("dpo", Shuffles())
    assert not gaps.used
