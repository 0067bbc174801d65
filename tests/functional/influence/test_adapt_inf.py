"""Adapt-infinity: what the authors' numbers do not say."""

import math

import numpy as np
import pytest

from dsel_trl.functional.influence.adapt_inf import (
    choose_in_clusters,
    coverage_sample,
    directional_derivative,
    distribution_entropy,
    most_entropic,
    similarity_in_clusters,
    without_duplicates,
)

RNG = np.random.default_rng(0)


def test_the_entropy_does_not_hang_on_the_scale():
    scores = RNG.normal(size=200)
    for scale in (1e-6, 1.0, 1e6):
        assert distribution_entropy(scale * scores + 3) == pytest.approx(distribution_entropy(scores), abs=0.05)
    assert distribution_entropy(1e6 * scores, "repo") != pytest.approx(distribution_entropy(scores, "repo"), abs=0.5)


def test_constant_and_unknown_scores_never_win():
    assert distribution_entropy([0.1] * 9) == 0.0
    assert distribution_entropy([]) == 0.0
    assert distribution_entropy([np.nan, np.inf]) == 0.0
    assert math.isnan(distribution_entropy([2.0, 2.0], "repo"))
    spread, constant = RNG.normal(size=20), np.ones(20)
    for mode in ("scale_free", "repo"):
        chosen, entropies = most_entropic({"constant": constant, "spread": spread}, np.zeros(20, dtype=int), 1, mode)
        assert chosen == ["spread"]
    assert set(entropies) == {"constant", "spread"}
    with pytest.raises(ValueError, match="'other'"):
        distribution_entropy([1.0], "other")


def test_the_wider_distribution_has_the_greater_entropy():
    narrow = np.concatenate([np.zeros(96), [5.0, -5.0, 4.0, -4.0]])
    assert distribution_entropy(RNG.uniform(size=100)) > distribution_entropy(narrow)


@pytest.mark.parametrize("budget", [1, 7, 50, 99, 100, 150])
def test_a_sample_has_the_size_that_is_asked_for(budget):
    scores = RNG.exponential(size=100)
    for rng in (None, np.random.default_rng(1)):
        picked = coverage_sample(scores, budget, rng=rng)
        assert len(picked) == min(budget, 100) == len(set(picked.tolist()))


def test_a_sample_covers_the_range_and_leaves_outliers_for_last():
    # Nine in ten scores are low: a sample of even coverage is not.
    scores = np.concatenate([RNG.uniform(0, 0.1, 900), RNG.uniform(0.1, 1, 100)])
    picked = coverage_sample(scores, 60, bins=10, rng=np.random.default_rng(0))
    assert (scores[picked] > 0.1).sum() > 40
    low, high = np.quantile(scores, [0.04, 0.96])
    assert ((scores[picked] >= low) & (scores[picked] <= high)).all()
    assert coverage_sample([1.0] * 5, 2, rng=np.random.default_rng(0)).shape == (2,)
    assert coverage_sample([], 2).tolist() == []
    with pytest.raises(ValueError, match="1 of 2 scores are not finite"):
        coverage_sample([1.0, np.nan], 1)


def test_the_published_sample_may_exceed_its_budget():
    scores = np.arange(200.0)
    assert len(coverage_sample(scores, 11, bins=10, strict=False)) == 20
    assert len(coverage_sample(scores, 11, bins=10)) == 11


def test_each_cluster_gets_its_share_and_unknown_examples_none():
    labels = np.repeat([0, 1, -1], [30, 10, 5])
    scores = {"a": RNG.normal(size=45), "b": RNG.normal(size=45)}
    scores["a"][:3] = np.nan
    ids = choose_in_clusters(scores, ["a", "b"], labels, 20, np.random.default_rng(0), bins=5)
    assert np.bincount(labels[ids]).tolist() == [10, 10]
    assert len(set(ids.tolist())) == 20


def test_of_duplicates_the_later_goes():
    vectors = RNG.normal(size=(6, 8))
    vectors[4], vectors[5] = 2 * vectors[0], vectors[1]
    labels = np.array([0, 0, 0, 0, 0, -1])
    similarity = similarity_in_clusters(vectors, labels)
    assert similarity[4] == pytest.approx(1.0)
    # The last belongs to no cluster: what is not known does not stay.
    assert without_duplicates(similarity, labels, 4).tolist() == [0, 1, 2, 3]
    assert without_duplicates(similarity, np.full(6, -1), 4).tolist() == []


def test_a_derivative_along_a_direction():
    point, direction = RNG.normal(size=4), RNG.normal(size=4)
    losses = lambda step: np.array([((point + step * direction) ** 2).sum(), (point + step * direction).sum()])  # noqa: E731
    expected = [2 * point @ direction, direction.sum()]
    np.testing.assert_allclose(directional_derivative(losses, 1e-3), expected, rtol=1e-8)
    with pytest.raises(ValueError, match="eps must be positive"):
        directional_derivative(losses, 0.0)
