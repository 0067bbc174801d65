import numpy as np
import pytest

from dsel_trl.functional.loss.infobatch import (
    infobatch_epoch,
    infobatch_prune,
    is_pruned_epoch,
    kept_share,
    well_learned,
)


def test_well_learned_is_strictly_below_the_mean():
    mean, mask = well_learned([1.0, 3.0, 5.0])
    assert mean == 3.0
    assert mask.tolist() == [True, False, False]


@pytest.mark.parametrize("value", [0.1, 0.7, 1.3, 3.0])
def test_equal_scores_prune_nothing(value):
    ids, weights = infobatch_prune(np.full(1001, value), np.random.default_rng(0))
    assert sorted(ids.tolist()) == list(range(1001))
    assert (weights == 1).all()


def test_the_published_mean_is_rounded_to_float32():
    rounded = [n for n in range(3, 40) if well_learned([0.1] * n, as_published=True)[1].any()]
    assert rounded
    ids, weights = infobatch_prune([0.1] * rounded[0], np.random.default_rng(0), as_published=True)
    assert len(ids) == rounded[0] // 2
    assert (weights[ids] == 2).all()
    scores = [0.1] * rounded[0]
    published, exact = (
        infobatch_epoch(scores, np.random.default_rng(0), pruned=True, prune_ratio=0.5, as_published=how)[0]
        for how in (True, False)
    )
    assert (len(published), len(exact)) == (len(ids), rounded[0])


def test_non_finite_scores_stay_and_do_not_move_the_mean():
    scores = [1.0, 3.0, np.nan, np.inf]
    assert well_learned(scores)[0] == 2.0
    ids, weights = infobatch_prune(scores, np.random.default_rng(0), prune_ratio=0.9)
    assert {1, 2, 3} <= set(ids.tolist())
    assert weights[2] == 1
    assert well_learned([np.nan, np.nan])[1].tolist() == [False, False]


@pytest.mark.parametrize("prune_ratio", [0.0, 0.3, 0.5, 0.8])
def test_weights_add_up_to_the_dataset(prune_ratio):
    scores = np.random.default_rng(1).gamma(2.0, size=500)
    mean, mask = well_learned(scores)
    ids, weights = infobatch_prune(scores, np.random.default_rng(2), prune_ratio=prune_ratio)
    lost = (1 - prune_ratio) * mask.sum() - int((1 - prune_ratio) * mask.sum() + 1e-9)
    assert weights[ids].sum() == pytest.approx(500 - lost / (1 - prune_ratio), rel=1e-5)
    assert set(np.flatnonzero(scores >= mean)) <= set(ids.tolist())
    assert len(set(ids.tolist())) == len(ids)


def test_exact_weight_removes_the_rounding_bias():
    scores = [0.0, 0.0, 0.0, 9.0]
    ids, weights = infobatch_prune(scores, np.random.default_rng(0), exact_weight=True)
    assert weights[ids].sum() == 4.0
    assert sorted(weights[ids].tolist()) == [1.0, 3.0]


def test_ratio_is_clamped_at_a_tenth():
    scores = np.r_[np.zeros(20), np.full(20, 5.0)]
    ids, weights = infobatch_prune(scores, np.random.default_rng(0), prune_ratio=0.95)
    assert (ids < 20).sum() == 2
    assert weights.max() == 10.0
    assert [kept_share(ratio) for ratio in (0.0, 0.5, 1.0)] == [1.0, 0.5, 0.1]


def test_min_keep_saves_a_group_of_one():
    assert infobatch_prune([0.0, 2.0], np.random.default_rng(0))[0].tolist() == [1]
    ids, weights = infobatch_prune([0.0, 2.0], np.random.default_rng(0), min_keep=1)
    assert sorted(ids.tolist()) == [0, 1]
    assert weights.tolist() == [2.0, 1.0]


@pytest.mark.parametrize(
    ("num_epochs", "delta", "expected"),
    [(8, 0.875, [True] * 7 + [False]), (4, 0.875, [True, True, True, False]), (3, 0.0, [False] * 3)],
)
def test_annealing_schedule(num_epochs, delta, expected):
    assert [is_pruned_epoch(e, num_epochs, delta) for e in range(num_epochs)] == expected


def test_schedule_survives_rounding():
    assert is_pruned_epoch(28, 100, 0.29)
    assert not is_pruned_epoch(29, 100, 0.29)


def test_annealed_epochs_have_weight_one_unless_the_reference_is_asked_for():
    scores = np.arange(10.0)
    stale = np.full(10, 2.0)
    ids, weights = infobatch_epoch(scores, np.random.default_rng(0), pruned=False)
    assert sorted(ids.tolist()) == list(range(10))
    assert (weights == 1).all()
    kept = infobatch_epoch(scores, np.random.default_rng(0), pruned=False, stale_weights=stale)
    assert kept[0].tolist() == ids.tolist()
    assert (kept[1] == 2).all()


@pytest.mark.parametrize("pruned", [True, False])
def test_an_epoch_decides_on_its_candidates_only(pruned):
    candidates = np.array([7, 2, 5, 0])
    ids, weights = infobatch_epoch(np.arange(10.0), np.random.default_rng(0), pruned=pruned, candidates=candidates)
    assert set(ids.tolist()) <= {7, 2, 5, 0}
    assert len(ids) == (3 if pruned else 4)
    assert len(weights) == 10
    assert candidates.tolist() == [7, 2, 5, 0]


def test_same_seed_same_lists():
    scores = np.random.default_rng(0).random(100)
    first, second = (infobatch_prune(scores, np.random.default_rng(5)) for _ in range(2))
    np.testing.assert_array_equal(first[0], second[0])
    np.testing.assert_array_equal(first[1], second[1])
    assert first[0].tolist() != infobatch_prune(scores, np.random.default_rng(6))[0].tolist()


@pytest.mark.parametrize("bad", [{"prune_ratio": 1.2}, {"prune_ratio": -0.1}, {"min_keep": -1}])
def test_bad_parameters_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        infobatch_prune([1.0, 2.0], np.random.default_rng(0), **bad)


def test_bad_delta_is_named():
    with pytest.raises(ValueError, match=r"delta.*1\.5"):
        is_pruned_epoch(0, 4, 1.5)
