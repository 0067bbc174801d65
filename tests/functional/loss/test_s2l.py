import math

import numpy as np
import pytest

from dsel_trl.functional.loss.s2l import balanced_quotas, cluster_trajectories, loss_trajectories, s2l_select


def test_trajectories_thin_and_fill():
    losses = [[1.0, math.nan, 3.0, 4.0, 5.0, math.inf]]
    assert loss_trajectories(losses).tolist() == [[1.0, 0.0, 3.0, 4.0, 5.0, 0.0]]
    assert loss_trajectories(losses, num_checkpoints=3).tolist() == [[1.0, 3.0, 5.0]]
    assert loss_trajectories(losses, num_checkpoints=50).shape == (1, 6)
    with pytest.raises(ValueError, match=r"\(2,\)"):
        loss_trajectories([1.0, 2.0])


def test_clusters_are_those_that_are_far_apart():
    rng = np.random.default_rng(0)
    truth = np.repeat([0, 1, 2], 40)
    rows = np.array([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0]])[truth] + rng.normal(scale=0.1, size=(120, 2))
    for seed in range(5):
        labels = cluster_trajectories(rows + 1000, np.random.default_rng(seed), n_clusters=30)
        assert all(len(set(truth[labels == label])) == 1 for label in set(labels.tolist()))
    labels = cluster_trajectories(rows, np.random.default_rng(1), n_clusters=2, iterations=50)
    assert len(set(labels.tolist())) == 2


def test_refinement_lowers_the_spread():
    rows = np.random.default_rng(1).normal(size=(300, 4))

    def spread(iterations):
        labels = cluster_trajectories(rows, np.random.default_rng(2), n_clusters=8, iterations=iterations)
        return sum(((rows[labels == c] - rows[labels == c].mean(0)) ** 2).sum() for c in set(labels.tolist()))

    assert spread(20) < spread(1)


def test_equal_trajectories_are_one_cluster():
    rng = np.random.default_rng(0)
    assert cluster_trajectories(np.ones((50, 3)), rng).tolist() == [0] * 50
    assert cluster_trajectories(np.empty((0, 3)), rng).tolist() == []
    assert len(set(cluster_trajectories([[0.0], [1.0], [1.0]], rng, n_clusters=3).tolist())) == 2
    with pytest.raises(ValueError, match="0"):
        cluster_trajectories([[0.0]], rng, n_clusters=0)


def test_quotas_by_hand():
    # 3 -> min(12 // 3, 3) = 3;  4 -> min(9 // 2, 4) = 4;  20 -> 5
    assert balanced_quotas([20, 3, 4], 12) == [5, 3, 4]
    assert balanced_quotas([5, 5], 3) == [1, 2]
    assert balanced_quotas([2, 3], 100) == [2, 3]
    assert balanced_quotas([], 5) == []
    with pytest.raises(ValueError, match="-1"):
        balanced_quotas([2], -1)


def test_small_clusters_wait_for_what_is_left():
    labels = np.array([0] * 6 + [1] * 2 + [2])
    rng = np.random.default_rng(0)
    assert (labels[s2l_select(labels, 5, rng)] == 0).all()
    picked = s2l_select(labels, 8, rng)
    assert set(range(6)) <= set(picked.tolist())
    assert len(set(picked.tolist())) == 8


@pytest.mark.parametrize("budget", [1, 7, 30, 64, 500])
def test_the_budget_is_met_without_repeats(budget):
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 9, size=64)
    picked = s2l_select(labels, budget, rng)
    assert len(picked) == len(set(picked.tolist())) == min(budget, 64)


def test_sources_share_the_budget():
    sources = np.array(["a"] * 4 + ["b"] * 40)
    labels = np.tile([0, 1], 22)
    picked = s2l_select(labels, 20, np.random.default_rng(2), sources=sources)
    assert (sources[picked] == "a").sum() == 4
    assert (sources[picked] == "b").sum() == 16
    assert (labels[picked][sources[picked] == "b"] == 0).sum() == 8


def test_the_same_seed_picks_the_same():
    labels = np.repeat([0, 1], 30)
    first, second = (s2l_select(labels, 10, np.random.default_rng(3)).tolist() for _ in range(2))
    assert first == second
