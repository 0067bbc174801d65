"""Budgets over groups of unequal size."""

import numpy as np
import pytest

from dsel_trl.functional.quotas import water_fill


@pytest.mark.parametrize(
    ("sizes", "budget", "expected"),
    [
        ([10, 10, 10], 9, [3, 3, 3]),
        ([2, 10, 30], 18, [2, 8, 8]),
        ([30, 2, 10], 40, [28, 2, 10]),
        ([5, 5, 5], 100, [5, 5, 5]),
        ([0, 4, 4], 4, [0, 2, 2]),
        ([4, 4], 0, [0, 0]),
        ([], 5, []),
        ([7], 5, [5]),
    ],
)
def test_shares(sizes, budget, expected):
    assert water_fill(sizes, budget).tolist() == expected


def test_shares_add_up_and_are_as_even_as_the_groups_allow():
    rng = np.random.default_rng(0)
    for _ in range(200):
        sizes = rng.integers(0, 40, size=rng.integers(1, 12))
        budget = int(rng.integers(0, sizes.sum() + 5))
        shares = water_fill(sizes, budget)
        assert shares.sum() == min(budget, sizes.sum())
        assert (shares <= sizes).all()
        # Whoever could give more gives as much as anyone, to within a few for rounding.
        short = shares < sizes
        if short.any():
            assert shares[short].min() >= shares.max() - len(sizes)


def test_untrimmed_shares_round_up():
    assert water_fill([10, 10, 10], 10, trim=False).tolist() == [4, 4, 4]
    assert water_fill([10, 10, 10], 10).tolist() == [4, 3, 3]


def test_what_cannot_be_shared_out_is_an_error():
    with pytest.raises(ValueError, match="a budget of -1"):
        water_fill([1], -1)
    with pytest.raises(ValueError, match=r"\[1, -2\]"):
        water_fill([1, -2], 1)
