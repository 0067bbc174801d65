"""Serving plans: every id once, ahead of the training by what the loader fetches, and the same again after a stop."""

from itertools import chain, islice

import numpy as np
import pytest

from dsel_trl.sampling.plan_sampler import PlanSampler


class Planner:
    """Plans what is left, in an order that depends on how many plans there were; remembers what it was asked."""

    def __init__(self, size, repeat=False):
        self.size, self.repeat, self.asked = size, repeat, []

    def __call__(self, served, plans_made):
        self.asked.append((served.tolist(), plans_made))
        left = np.setdiff1d(np.arange(self.size), served)
        if not len(left) and self.repeat:
            left = np.arange(self.size)
        return np.random.default_rng(plans_made).permutation(left)


def test_an_epoch_serves_the_plan():
    planner = Planner(7)
    sampler = PlanSampler(planner, length=7, block=2)
    ids = list(sampler)
    assert len(sampler) == 7
    assert ids == planner(np.array([], dtype=int), 0).tolist()
    assert sampler.history.tolist() == ids


def test_each_epoch_has_a_plan_of_its_own():
    planner = Planner(6)
    sampler = PlanSampler(planner, 6, 2)
    first, second = list(sampler), list(sampler)
    assert sorted(first) == sorted(second) == list(range(6))
    assert first != second
    assert planner.asked == [([], 0), ([], 1)]


def test_a_shorter_plan_is_asked_for_again():
    planner = Planner(4, repeat=True)
    ids = list(PlanSampler(planner, length=10, block=3))
    assert len(ids) == 10
    assert sorted(ids[:4]) == sorted(ids[4:8]) == list(range(4))
    assert [plans for _, plans in planner.asked] == [0, 1, 2]
    assert planner.asked[1][0] == ids[:4]


def test_a_longer_plan_is_cut():
    sampler = PlanSampler(Planner(9), length=5, block=2)
    assert len(list(sampler)) == 5
    # The rest of the plan is not served in the next epoch.
    assert len(set(sampler)) == 5


def test_carried_over_a_plan_goes_on():
    plans = []

    def plan(served, plans_made):
        plans.append(np.random.default_rng(plans_made).permutation(6))
        return plans[-1]

    sampler = PlanSampler(plan, length=4, block=2, carry_over=True)
    assert [*sampler, *sampler, *sampler] == [*plans[0], *plans[1]]
    assert len(plans) == 2


def test_a_due_plan_replaces_the_rest():
    planner = Planner(10)
    sampler = PlanSampler(planner, 10, block=2)
    served = iter(sampler)
    first = list(islice(served, 4))
    sampler.due = True
    rest = list(served)
    assert sorted(first + rest) == list(range(10))
    assert planner.asked == [([], 0), (first, 1)]
    assert rest == planner(np.array(first), 1).tolist()
    assert not sampler.due


def test_a_block_is_drawn_together():
    """A plan that comes due inside a micro-batch waits for its end: all ranks train one plan's batch."""
    planner = Planner(8)
    sampler = PlanSampler(planner, 8, block=4)
    served = iter(sampler)
    head = [next(served)]
    assert len(sampler.history) == 4
    sampler.due = True
    head += islice(served, 3)
    assert len(planner.asked) == 1
    next(served)
    assert planner.asked[1] == (head, 1)


def test_iterating_anew_starts_over():
    sampler = PlanSampler(Planner(6), 6, 2)
    first = iter(sampler)
    next(first)
    second = iter(sampler)
    assert first is not second
    assert sorted(second) == list(range(6))


@pytest.mark.parametrize("length", [0, -1])
def test_an_epoch_without_examples_is_refused(length):
    with pytest.raises(ValueError, match="cannot be served"):
        PlanSampler(Planner(3), length, 1)


def test_an_empty_plan_is_refused():
    with pytest.raises(ValueError, match="The plan is empty"):
        list(PlanSampler(lambda served, plans: [], 3, 1))


# ---- Stopped and resumed ----


def after(sampler, planner_size, saved, mid_epoch=True, replay=True, **more):
    arrays, values = saved
    resumed = PlanSampler(Planner(planner_size, repeat=True), sampler.length, sampler.block, **more)
    resumed.load_state_dict({key: array.copy() for key, array in arrays.items()}, dict(values), replay=replay)
    return resumed


@pytest.mark.parametrize("carry_over", [False, True])
@pytest.mark.parametrize("due_at", [None, 2, 5])
@pytest.mark.parametrize("stop", range(1, 12))
def test_stopped_anywhere_and_resumed(stop, due_at, carry_over):
    """Two epochs, stopped after any draw: the history comes again unchanged, then what would have come."""

    def new():
        return PlanSampler(Planner(9, repeat=True), length=11, block=2, carry_over=carry_over)

    def serve(sampler, until=None, due=due_at):
        ids = []
        for id_ in chain(sampler, sampler):
            ids.append(id_)
            if len(ids) == due:
                sampler.due = True
            if len(ids) == until:
                break
        return ids

    whole = serve(new())
    stopped = new()
    serve(stopped, until=stop)
    arrays, values = stopped.state_dict(mid_epoch=True)
    assert arrays["history"].tolist()[:stop] == whole[:stop]
    resumed = after(stopped, 9, (arrays, values), carry_over=carry_over)
    # What was due before the stop is in the saved state.
    again = serve(resumed, due=None if due_at is None or due_at <= stop else due_at)
    assert again == whole


def test_a_finished_history_is_not_replayed():
    sampler = PlanSampler(Planner(6), 6, 2)
    first = list(sampler)
    arrays, values = sampler.state_dict(mid_epoch=False)
    assert not len(arrays["history"])
    second = list(sampler)
    resumed = after(sampler, 6, (arrays, values))
    assert list(resumed) == second
    assert second != first


def test_without_skipping_an_epoch_starts_anew():
    sampler = PlanSampler(Planner(6), 6, 2)
    list(islice(iter(sampler), 2))
    resumed = after(sampler, 6, sampler.state_dict(mid_epoch=True), replay=False)
    assert sorted(resumed) == list(range(6))
    assert resumed.plans_made == 2


def test_what_was_saved_does_not_change_with_the_run():
    sampler = PlanSampler(Planner(6), 6, 1)
    served = iter(sampler)
    next(served)
    arrays, _ = sampler.state_dict(mid_epoch=True)
    before = {key: array.copy() for key, array in arrays.items()}
    list(served)
    np.testing.assert_array_equal(arrays["history"], before["history"])


def test_another_length_is_refused():
    saved = PlanSampler(Planner(6), 6, 1).state_dict(mid_epoch=False)
    with pytest.raises(ValueError, match="made with 6 examples per epoch, this run has 5"):
        PlanSampler(Planner(6), 5, 1).load_state_dict(*saved, replay=True)
