import numpy as np
import pytest
from scipy.stats import spearmanr

from dsel_trl.functional.influence.data_shapley import exact_shapley, subsets
from dsel_trl.functional.influence.mtm_fit import (
    isotonic,
    linear_weights,
    modular_fit,
    residual,
    spearman,
    spearman_by_size,
    trusted,
)


def sets(count=400, players=8, seed=0):
    return np.random.default_rng(seed).random((count, players)) < 0.5


def test_weights_of_a_sum_are_found():
    members, weights = sets(), np.arange(8) - 3.0
    np.testing.assert_allclose(linear_weights(members, members @ weights + 5), weights, atol=1e-5)
    np.testing.assert_allclose(linear_weights(members, members @ weights + 5, ridge=0.0), weights, atol=1e-10)


def test_isotonic_regression_is_scikit_learns():
    isotonic_regression = pytest.importorskip("sklearn.isotonic").IsotonicRegression
    rng = np.random.default_rng(0)
    sums = rng.integers(0, 30, 200) / 7
    worth = np.sin(sums) + 0.1 * rng.standard_normal(200)
    reference = isotonic_regression(out_of_bounds="clip").fit(sums, worth)
    function = isotonic(sums, worth)
    for points in (sums, np.linspace(-1, 6, 50)):
        np.testing.assert_allclose(function(points), reference.predict(points), atol=1e-9)
    assert (np.diff(function.values) >= 0).all()


def test_rank_correlation_is_scipys():
    rng = np.random.default_rng(0)
    one, other = rng.integers(0, 6, 50), rng.standard_normal(50)
    np.testing.assert_allclose(spearman(one, other), spearmanr(one, other).statistic)
    assert np.isnan(spearman(np.ones(5), np.arange(5)))
    members, weights = sets(60), rng.standard_normal(8)
    worth = rng.standard_normal(60)
    for size, found in spearman_by_size(members, weights, worth).items():
        at = members.sum(axis=1) == size
        np.testing.assert_allclose(found, spearman((members @ weights)[at], worth[at]))


def test_a_function_of_a_sum_is_recognised_and_isotron_helps():
    members, weights = sets(), np.linspace(-2, 3, 8)
    worth = 1 / (1 + np.exp(-3 * (members @ weights - 2)))
    held = np.arange(400) % 5 == 0
    plain = modular_fit(members, worth, held, iterations=0)
    fit = modular_fit(members, worth, held)
    assert fit.residual < 0.5 * plain.residual < 0.05
    outside = residual(worth[held], fit.function(members[held] @ fit.weights))
    np.testing.assert_allclose(fit.residual, outside)


def test_a_game_of_duplicates_is_not_trusted():
    """Four pairs of twins: the second of two adds nothing, so sums tell the sets of one size hardly apart."""
    twins = subsets(8)
    worth = (twins[:, :4] | twins[:, 4:]) @ np.array([1.0, 1.0, 1.0, 1.0])
    held = np.random.default_rng(0).random(256) < 0.2
    fit = modular_fit(twins, worth, held)
    values = exact_shapley(worth)
    np.testing.assert_allclose(values, 0.5)
    by_values = spearman_by_size(twins, values, worth)[4]
    assert np.isnan(by_values)
    assert fit.residual > 0.1
    assert not trusted(fit.residual, [by_values])


@pytest.mark.parametrize(
    ("left", "correlations", "verdict"),
    [(0.2, [0.5, 0.9], True), (0.21, [0.9], False), (0.0, [0.9, 0.49], False), (0.0, [np.nan], False)],
)
def test_the_verdict(left, correlations, verdict):
    assert trusted(left, correlations) is verdict


def test_what_does_not_vary_leaves_nothing():
    assert residual([2.0, 2.0], [1.0, 3.0]) == 0.0
