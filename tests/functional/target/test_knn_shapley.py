import itertools
import math

import numpy as np
import pytest

from dsel_trl.functional.target.knn_shapley import knn_shapley, knn_shapley_values


def enumerated(distances, matches, neighbours):
    """Shapley values by their definition."""
    count, order = len(distances), np.argsort(distances, kind="stable")

    def worth(members):
        nearest = [i for i in order if i in members][:neighbours]
        return sum(matches[i] for i in nearest) / neighbours

    values = np.zeros(count)
    for i in range(count):
        others = [j for j in range(count) if j != i]
        for size in range(count):
            share = math.factorial(size) * math.factorial(count - size - 1) / math.factorial(count)
            for members in itertools.combinations(others, size):
                values[i] += share * (worth({*members, i}) - worth(set(members)))
    return values


@pytest.mark.parametrize(("count", "neighbours"), [(1, 3), (3, 5), (6, 2), (7, 1), (6, 6)])
@pytest.mark.parametrize("soft", [False, True])
def test_the_closed_form_is_the_definition(count, neighbours, soft):
    rng = np.random.default_rng(count)
    distances = rng.integers(0, 4, count).astype(float)
    matches = rng.random(count) if soft else rng.integers(0, 2, count).astype(float)
    expected = enumerated(distances, matches, neighbours)
    np.testing.assert_allclose(knn_shapley_values(distances, matches, neighbours), expected, atol=1e-12)


def test_the_mean_over_the_target_in_blocks():
    rng = np.random.default_rng(0)
    vectors, target, matches = rng.standard_normal((9, 3)), rng.standard_normal((5, 3)), rng.random((5, 9))
    each = [knn_shapley_values(((vectors - point) ** 2).sum(1), matches[i], 2) for i, point in enumerate(target)]
    for block in (1, 2, 16):
        got = knn_shapley(vectors, target, lambda i: matches[i], 2, metric="sqeuclidean", block=block)
        np.testing.assert_allclose(got, np.mean(each, axis=0))


def test_what_is_not_finite_is_nobodys_neighbour():
    rng = np.random.default_rng(0)
    vectors, target = rng.standard_normal((6, 3)), rng.standard_normal((3, 3))
    spoiled, goal = vectors.copy(), np.vstack([target, np.full((1, 3), np.nan)])
    spoiled[2] = np.nan
    got = knn_shapley(spoiled, goal, lambda i: np.arange(6) % 2, 2)
    rest = [0, 1, 3, 4, 5]
    assert np.isnan(got[2])
    np.testing.assert_allclose(got[rest], knn_shapley(vectors[rest], target, lambda i: np.arange(6)[rest] % 2, 2))
    with pytest.raises(ValueError, match="No embedding of the examples"):
        knn_shapley(spoiled[2:3], target, lambda i: [1], 2)
    with pytest.raises(ValueError, match="neighbours=0"):
        knn_shapley_values([1.0], [1.0], 0)
