import itertools
import math

import numpy as np
import pytest

from dsel_trl.functional.influence.data_shapley import drift, exact_shapley, marginals, mean_marginals, subsets


@pytest.mark.parametrize("players", [1, 2, 3, 5])
def test_exact_values_are_the_mean_over_all_orders(players):
    rng = np.random.default_rng(players)
    worth = rng.standard_normal(2**players)
    rows = []
    for order in itertools.permutations(range(players)):
        growing = [worth[sum(1 << p for p in order[: i + 1])] for i in range(players)]
        row, count = marginals(order, growing, worth[0], worth[-1])
        assert count == players
        rows.append(row)
    values = exact_shapley(worth)
    np.testing.assert_allclose(values, mean_marginals(rows), atol=1e-12)
    np.testing.assert_allclose(values.sum(), worth[-1] - worth[0])


def test_sets_are_numbered_by_their_bits():
    assert subsets(3)[5].tolist() == [True, False, True]
    assert subsets(3)[6].tolist() == [False, True, True]


@pytest.mark.parametrize("worth", [[], [1.0], [0.0, 1.0, 2.0], [0.0, math.nan], [[0.0, 1.0]]])
def test_what_is_no_game_is_refused(worth):
    with pytest.raises(ValueError, match=r"2\*\*n sets"):
        exact_shapley(worth)


def test_a_walk_ends_when_nothing_is_left_to_add():
    asked = []

    def growing():
        for worth in (0.5, 0.999, 0.9, 0.995, 1.001, 1.0):
            asked.append(worth)
            yield worth

    row, count = marginals([3, 0, 5, 1, 2, 4], growing(), 0.0, 1.0, tolerance=0.01, patience=2)
    # A set that is worse again sets the count back; what comes after the second hit in a row is never asked for.
    assert count == len(asked) == 5
    np.testing.assert_allclose(row, [0.499, 0.095, 0.006, 0.5, 0.0, -0.099], atol=1e-12)


def test_a_full_worth_of_nothing_does_not_truncate():
    row, count = marginals([0, 1, 2], [1e-9, -1e-9, 0.0], 0.0, 0.0, tolerance=0.01, patience=1)
    assert count == 3
    np.testing.assert_allclose(row, [1e-9, -2e-9, 1e-9])


def test_an_order_that_fails_is_not_averaged():
    row, count = marginals([1, 0, 2], [1.0, math.nan, 2.0], 0.0, 2.0)
    assert count == 2
    assert np.isnan(row).all()
    np.testing.assert_array_equal(mean_marginals([row, [1.0, 2.0, 3.0]]), [1, 2, 3])
    assert np.isnan(mean_marginals([row])).all()


def test_drift_is_how_far_the_means_have_moved():
    rng = np.random.default_rng(0)
    rows = 1.0 + 0.1 * rng.standard_normal((250, 4))
    means = np.cumsum(rows, axis=0) / np.arange(1, 251)[:, None]
    expected = max((np.abs(mean - means[-1]) / np.abs(means[-1])).mean() for mean in means[-100:])
    np.testing.assert_allclose(drift(rows), expected)
    assert drift(rows[:99]) == math.inf
    assert drift(np.ones((100, 4))) < 1e-12
    # Failed orders are none.
    spoiled = np.insert(rows, 120, np.nan, axis=0)
    np.testing.assert_allclose(drift(spoiled), expected)
