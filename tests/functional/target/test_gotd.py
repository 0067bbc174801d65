import importlib.util

import numpy as np
import pytest

from dsel_trl.functional.target.gotd import calibrated_gradient, target_gradient
from dsel_trl.functional.target.relevance import most_relevant


def test_calibration_compares_with_the_others():
    f = np.array([1.0, -2.0, 4.0])
    np.testing.assert_allclose(calibrated_gradient(f), [1 - 1, -2 - 2.5, 4 + 0.5])
    np.testing.assert_allclose(calibrated_gradient(f + 7), calibrated_gradient(f))
    assert calibrated_gradient([3.0]).tolist() == [0.0]


def test_an_unknown_potential_counts_for_none():
    with_nan = calibrated_gradient([1.0, np.nan, -2.0, 4.0])
    assert np.isnan(with_nan[1])
    np.testing.assert_allclose(with_nan[[0, 2, 3]], calibrated_gradient([1.0, -2.0, 4.0]))


def clouds(seed=0):
    rng = np.random.default_rng(seed)
    centers = np.eye(8)[:3] * 4
    domains = np.repeat([0, 1, 2], 30)
    return centers[domains] + rng.standard_normal((90, 8)) * 0.3, domains, centers


def test_what_the_target_needs_has_the_most_negative_gradient():
    vectors, domains, centers = clouds()
    target = centers[1] + np.random.default_rng(1).standard_normal((12, 8)) * 0.3
    assert (domains[np.argsort(target_gradient(vectors, target))[:30]] == 1).all()


def test_what_the_pool_has_enough_of_is_not_asked_for():
    """A target of two halves: the half that the pool lacks comes first."""
    vectors, domains, centers = clouds()
    vectors, domains = (
        vectors[(domains == 0) | (np.arange(90) % 10 == 0)],
        domains[(domains == 0) | (np.arange(90) % 10 == 0)],
    )
    target = np.concatenate([centers[0] + np.zeros((6, 8)), centers[1] + np.zeros((6, 8))])
    first = np.argsort(target_gradient(vectors, target))[: int((domains == 1).sum())]
    assert (domains[first] == 1).all()


def test_what_is_not_finite_is_left_out():
    vectors, _, centers = clouds()
    target = np.vstack([centers[1:2] + 0.1, np.full((1, 8), np.inf)])
    spoiled = np.vstack([vectors, np.full((1, 8), np.nan)])
    got = target_gradient(spoiled, target)
    assert np.isnan(got[-1])
    np.testing.assert_allclose(got[:-1], target_gradient(vectors, target[:1]))
    with pytest.raises(ValueError, match="No embedding of the target"):
        target_gradient(vectors, np.full((2, 8), np.nan))
    with pytest.raises(ValueError, match="No embedding of the candidates"):
        target_gradient(np.full((2, 8), np.nan), vectors)


def test_solvers():
    vectors, _, centers = clouds()
    with pytest.raises(ValueError, match="solver='lp'"):
        target_gradient(vectors, centers, solver="lp")
    if importlib.util.find_spec("ot") is None:
        with pytest.raises(ImportError, match=r"dsel-trl\[ot\]"):
            target_gradient(vectors, centers, solver="exact")
    else:
        exact, smooth = (target_gradient(vectors, centers[1:2], solver=name) for name in ("exact", "sinkhorn"))
        np.testing.assert_allclose(exact, smooth, atol=1e-6)


def test_the_nearest_domains():
    vectors, domains, centers = clouds()
    target = centers[2] + np.random.default_rng(1).standard_normal((20, 8)) * 0.3 + 0.5 * centers[0]
    kept, distances = most_relevant(vectors, domains, target, 2, rng=np.random.default_rng(0))
    assert kept.tolist() == [2, 0]
    assert np.argsort(distances).tolist() == [2, 0, 1]
    few, _ = most_relevant(vectors, domains, target, 1, samples=5, rng=np.random.default_rng(0))
    assert few.tolist() == [2]
    vectors[domains == 2] = np.nan
    kept, distances = most_relevant(vectors, domains, target, 2, rng=np.random.default_rng(0))
    assert kept.tolist() == [0, 1]
    assert np.isnan(distances[2])
