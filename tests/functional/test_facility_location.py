"""Facility location: blocks and increments pick what the plain greedy loop over the whole matrix picks."""

import numpy as np
import pytest

from dsel_trl.functional import facility_location as module
from dsel_trl.functional.facility_location import facility_location
from dsel_trl.functional.kmeans import unit_rows


def distances(rows):
    unit = unit_rows(np.asarray(rows, dtype=np.float64))
    squared = 2 - 2 * unit @ unit.T
    return np.sqrt(np.where(squared < 1e-12, 0, squared))


def plain_greedy(similarity, k):
    covered, picks = np.zeros(len(similarity)), []
    for _ in range(k):
        gains = np.maximum(similarity - covered[:, None], 0).sum(axis=0).round(9)
        gains[picks] = -1
        picks.append(int(gains.argmax()))
        covered = np.maximum(covered, similarity[:, picks[-1]])
    return picks


def gaussians(n=150, d=6, seed=0):
    return np.random.default_rng(seed).standard_normal((n, d))


@pytest.mark.parametrize(
    "rows",
    [gaussians(), np.repeat(gaussians(30), 5, axis=0), np.abs(gaussians(120, 3))],
    ids=["any", "copies", "near"],
)
@pytest.mark.parametrize(("block_size", "tile"), [(1, 4096), (7, 16), (256, 4096)])
def test_every_pick_is_the_plain_one(monkeypatch, rows, block_size, tile):
    monkeypatch.setattr(module, "TILE", tile)
    picks = facility_location(rows.astype(np.float32), 50, block_size=block_size)
    expected = plain_greedy(1 - distances(rows.astype(np.float32)) / 2, 50)
    if len(rows) == 150 and len(np.unique(rows, axis=0)) == 30:
        # Once one of each is picked nothing is gained any more.
        assert picks[:30].tolist() == expected[:30]
        assert picks[30:].tolist() == [i for i in range(150) if i not in expected[:30]][:20]
    else:
        assert picks.tolist() == expected


def test_the_published_kernel_picks_the_same():
    """`exp(-distance / d)`, with the library the authors used (hf.co/papers/2402.00530)."""
    rows = gaussians(200, 384)
    assert facility_location(rows, 40).tolist() == plain_greedy(np.exp(-distances(rows) / 384), 40)


def test_one_of_each_group_comes_first():
    centers = np.eye(5)[np.arange(40) % 5]
    picks = facility_location(centers + 0.05 * gaussians(40, 5), 5)
    assert sorted(picks % 5) == [0, 1, 2, 3, 4]


def test_it_covers_better_than_a_random_choice():
    rows = gaussians(300, 8)
    similarity = 1 - distances(rows) / 2
    mine = similarity[:, facility_location(rows, 20)].max(axis=1).sum()
    rng = np.random.default_rng(0)
    others = [similarity[:, rng.choice(300, 20, replace=False)].max(axis=1).sum() for _ in range(50)]
    assert mine > max(others)


def test_sizes_and_ties():
    assert facility_location(np.zeros((0, 3)), 4).tolist() == []
    assert facility_location(np.ones((3, 2)), 99).tolist() == [0, 1, 2]
    assert facility_location(gaussians(5), 0).shape == (1,)
    assert facility_location(np.zeros((4, 3)), 2).tolist() == [0, 1]
    assert sorted(facility_location(gaussians(40), 40)) == list(range(40))


def test_errors_name_the_value():
    with pytest.raises(ValueError, match=r"ids \[1\]"):
        facility_location([[1.0, 0.0], [np.inf, 0.0]], 1)
    with pytest.raises(ValueError, match="block_size"):
        facility_location([[1.0, 0.0]], 1, block_size=0)
