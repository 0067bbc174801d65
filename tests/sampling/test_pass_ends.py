import numpy as np

from dsel_trl.sampling.pass_ends import PassEnds
from dsel_trl.sampling.plan_sampler import PlanSampler


def test_passes_end_where_their_plans_do():
    passes = PassEnds()
    assert passes.begun == 0
    assert passes.after(1) == float("inf")
    passes.planned(40, 0, anew=True)
    assert (passes.begun, passes.after(1), passes.after(0.25)) == (1, 40, 10)
    # Thirty were waiting when a new plan replaced them by twelve.
    passes.planned(12, 30, anew=False)
    assert (passes.begun, passes.after(1)) == (1, 22)
    assert passes.after(1.5) == float("inf")
    passes.planned(20, 0, anew=True)
    assert (passes.after(1), passes.after(1.5), passes.after(2)) == (22, 32, 42)
    assert PassEnds(passes.array).after(2) == 42


def test_a_pass_goes_over_the_border_of_epochs_and_knows_what_it_has_served():
    asked = []

    def plan(served, plans_made):
        asked.append(served.tolist())
        return np.setdiff1d(np.arange(6), served)

    sampler = PlanSampler(plan, length=4, block=2, carry_over=True)
    epochs = [list(sampler) for _ in range(2)]
    assert epochs == [[0, 1, 2, 3], [4, 5, 0, 1]]
    assert asked == [[], []]
    sampler.due = True
    assert list(sampler) == [2, 3, 4, 5]
    assert asked[2] == [0, 1]
    assert sampler.passes.array.tolist() == [6, 12]
    arrays, values = sampler.state_dict(mid_epoch=False)
    resumed = PlanSampler(plan, length=4, block=2, carry_over=True)
    resumed.load_state_dict(arrays, values, replay=True)
    assert list(resumed) == list(sampler) == [0, 1, 2, 3]
    assert resumed.passes.array.tolist() == [6, 12, 18]
