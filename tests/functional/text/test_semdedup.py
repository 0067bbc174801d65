from itertools import pairwise

import numpy as np
import pytest

from dsel_trl.functional.kmeans import spherical_kmeans, unit_rows
from dsel_trl.functional.text.semdedup import (
    eps_for_fraction,
    max_similarity,
    max_similarity_to_earlier,
    rank_clusters,
    semdedup_keep,
)


def random_rows(n=60, d=5, seed=0):
    return unit_rows(np.random.default_rng(seed).standard_normal((n, d)))


def test_similarity_to_earlier_by_hand():
    rows = [[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [-1.0, 0.0]]
    np.testing.assert_allclose(max_similarity_to_earlier(rows), [0, 0, 0.8, 0])


@pytest.mark.parametrize("block_size", [1, 7, 4096])
def test_blocks_change_nothing(block_size):
    rows = random_rows()
    full = np.tril(rows @ rows.T, -1).max(axis=1)
    np.testing.assert_allclose(max_similarity_to_earlier(rows, block_size=block_size), np.clip(full, 0, 1))


def test_order_in_a_cluster():
    rows = unit_rows([[1.0, 0.0], [1.0, 0.2], [1.0, 1.0], [0.0, -1.0]])
    hard = rank_clusters(rows, [0, 0, 0, 1], [[1.0, 0.0], [0.0, -1.0]])
    assert [order.ids.tolist() for order in hard] == [[2, 1, 0], [3]]
    easy = rank_clusters(rows, [0, 0, 0, 1], [[1.0, 0.0], [0.0, -1.0]], keep="easy")
    assert [order.ids.tolist() for order in easy] == [[0, 1, 2], [3]]
    assert hard[1].max_similarity.tolist() == [0.0]


def test_duplicates_keep_one_and_eps_zero_keeps_all():
    rows = unit_rows(np.repeat(np.random.default_rng(1).standard_normal((4, 6)), 3, axis=0))
    similarity = max_similarity(rank_clusters(rows, np.zeros(12, int), rows.mean(axis=0, keepdims=True)), 12)
    kept = semdedup_keep(similarity, 1e-4)
    assert sorted(kept // 3) == [0, 1, 2, 3]
    assert len(semdedup_keep(similarity, 0.0)) == 12


def test_what_exceeds_one_is_clipped_unless_asked_for():
    rows = [[1.0, 1e-2], [1.0, 1e-2], [1.0, 0.0]]
    assert max_similarity_to_earlier(rows).tolist() == [0.0, 1.0, 1.0]
    published = rank_clusters(rows, [0, 0, 0], [[0.0, 1.0]], clip=False)
    assert semdedup_keep(max_similarity(published, 3), 0.0).tolist() == [0, 2]
    np.testing.assert_allclose(max_similarity_to_earlier(rows, clip=False), [0, 1.0001, 1])


def test_kept_set_grows_when_eps_shrinks():
    rows = random_rows(200)
    labels, centroids = spherical_kmeans(rows, 5)
    similarity = max_similarity(rank_clusters(rows, labels, centroids), len(rows))
    sets = [set(semdedup_keep(similarity, eps).tolist()) for eps in (0.4, 0.2, 0.05, 0.0)]
    assert all(small <= large for small, large in pairwise(sets))
    assert 0 < len(sets[0]) < len(sets[-1]) == 200


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.75, 1.0])
def test_eps_for_fraction_hits_the_size(fraction):
    rows = random_rows(101)
    similarity = max_similarity_to_earlier(rows)
    similarity[0] = 0.001
    assert len(semdedup_keep(similarity, eps_for_fraction(similarity, fraction))) == max(1, int(fraction * 101))


def test_random_needs_a_generator_and_is_reproducible():
    rows, labels = random_rows(20), np.zeros(20, int)
    center = np.ones((1, 5))
    with pytest.raises(ValueError, match="rng"):
        rank_clusters(rows, labels, center, keep="random")
    first, second = (
        rank_clusters(rows, labels, center, keep="random", rng=np.random.default_rng(3))[0].ids for _ in range(2)
    )
    assert first.tolist() == second.tolist()
    assert sorted(first.tolist()) == list(range(20))


def test_errors_name_the_value():
    with pytest.raises(ValueError, match="softest"):
        rank_clusters(random_rows(2), [0, 0], np.ones((1, 5)), keep="softest")
    with pytest.raises(ValueError, match="3"):
        rank_clusters(random_rows(2), [0, 3], np.ones((1, 5)))
    with pytest.raises(ValueError, match=r"-0\.1"):
        semdedup_keep([0.5], -0.1)
