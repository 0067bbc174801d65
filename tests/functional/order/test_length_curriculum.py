import random

import numpy as np
import pytest

from dsel_trl.functional.order.length_curriculum import (
    bucket_probabilities,
    curriculum_odds,
    cycle_counts,
    cycle_schedule,
    schedule_by_odds,
    schedule_by_subcycles,
    subcycle_counts,
    subcycle_odds,
)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("uniform", [1, 1, 1]),
        ("grow_linear", [3, 2, 1]),
        ("grow_p2", [4, 2, 1]),
        ("grow_p100", [10000, 100, 1]),
        ("shrink_p100", [1, 100, 10000]),
        ([5, 1, 2], [5, 1, 2]),
    ],
)
def test_odds(name, expected):
    assert curriculum_odds(name, 3).tolist() == expected


def test_remainder_goes_to_the_first_cycles():
    assert cycle_counts([5, 4, 1], 2).tolist() == [[3, 2, 1], [2, 2, 0]]
    assert cycle_counts([5, 4, 1], 2, drop_remainder=True).tolist() == [[2, 2, 0], [2, 2, 0]]


def test_probabilities():
    np.testing.assert_allclose(bucket_probabilities([4, 0, 2], [1, 9, 2]), [0.5, 0, 0.5])
    assert bucket_probabilities([0, 0], [1, 2]).tolist() == [0, 0]


@pytest.mark.parametrize("rng", [random.Random(0), np.random.default_rng(0)])
def test_schedule_uses_each_batch_once(rng):
    steps = schedule_by_odds([7, 0, 3], [4, 2, 1], rng)
    assert np.bincount(steps, minlength=3).tolist() == [7, 0, 3]
    assert schedule_by_odds([0, 0], [1, 1], rng).tolist() == []
    assert schedule_by_odds([4], [1], rng).tolist() == [0] * 4


@pytest.mark.parametrize(
    ("curriculum", "construction"),
    [
        ("grow_linear", "odds"),
        ("grow_p2", "odds"),
        ("grow_p100", "odds"),
        ("shrink_p100", "odds"),
        ("grow_linear", "subcycle"),
        ("grow_p2", "subcycle"),
    ],
)
def test_growing_curricula_grow_and_shrinking_ones_shrink(curriculum, construction):
    lengths, first, last = 2 ** np.arange(8, 12), 0.0, 0.0
    for seed in range(30):
        steps = lengths[cycle_schedule([30] * 4, curriculum, np.random.default_rng(seed), construction=construction)]
        first, last = first + steps[:40].mean() / 30, last + steps[-40:].mean() / 30
    gap = last - first if curriculum.startswith("grow") else first - last
    assert gap > 100
    uniform = [lengths[cycle_schedule([30] * 4, "uniform", np.random.default_rng(seed))] for seed in range(30)]
    assert abs(np.mean([steps[-40:].mean() - steps[:40].mean() for steps in uniform])) < 100


def test_subcycle_rows_add_up():
    odds = subcycle_odds("grow_p2", 5)
    for total in range(40):
        counts = subcycle_counts([total] * 5, odds)
        assert (counts >= 0).all()
        assert counts.sum(axis=1).tolist() == [total] * 5


def test_surplus_is_kept_only_on_request():
    odds = [[1, 1], [1, 1]]
    assert subcycle_counts([3, 3], odds).tolist() == [[2, 1], [2, 1]]
    assert subcycle_counts([3, 3], odds, clip_surplus=False).tolist() == [[2, 2], [2, 2]]


def test_longest_batch_comes_first():
    for seed in range(10):
        steps = schedule_by_subcycles([[3, 0], [2, 1], [0, 2]], np.random.default_rng(seed))
        assert steps[0] == 2
        assert np.bincount(steps).tolist() == [3, 3, 2]
    assert schedule_by_subcycles(np.zeros((2, 2)), np.random.default_rng(0)).tolist() == []


def test_errors_name_the_value():
    with pytest.raises(ValueError, match="grow_p3"):
        curriculum_odds("grow_p3", 3)
    with pytest.raises(ValueError, match=r"3 positive odds.*\[1, 2\]"):
        curriculum_odds([1, 2], 3)
    with pytest.raises(ValueError, match="cycles"):
        cycle_counts([1], 0)
    with pytest.raises(ValueError, match="-2"):
        cycle_counts([-2], 1)
    with pytest.raises(ValueError, match="uniform"):
        subcycle_odds("uniform", 3)
    with pytest.raises(ValueError, match="spiral"):
        cycle_schedule([1], "uniform", np.random.default_rng(0), construction="spiral")
