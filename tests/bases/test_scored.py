"""What all scored methods share: filling gaps, keeping, ordering, pacing."""

import logging
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from dsel_trl.bases.scored import (
    ByScore,
    in_order,
    keep_band,
    keep_top,
    known_scores,
    paced,
    tell_ties,
    untied,
    with_unseen,
)
from dsel_trl.core.ledger import Ledger
from dsel_trl.functional.pacing import pacing_size
from dsel_trl.functional.ranking import band
from tests.runs import make_run

NAN, INF = float("nan"), float("inf")


def rng(seed=0):
    return np.random.default_rng(seed)


def test_unseen_examples_count_as_random_seen_ones():
    scores = np.array([1.0, NAN, 3.0, NAN, -INF], dtype=np.float32)
    draws = np.stack([with_unseen(scores, rng(seed)) for seed in range(200)])
    assert (draws[:, [0, 2]] == [1.0, 3.0]).all()
    assert (draws[:, 4] == -INF).all()
    for column in (1, 3):
        assert set(draws[:, column]) == {1.0, 3.0}
        assert 0.3 < (draws[:, column] == 3.0).mean() < 0.7
    assert np.isnan(scores[1]), "the ledger's own column is not filled"


@pytest.mark.parametrize("scores", [[NAN] * 50, [0.0] * 50, [NAN] * 49 + [2.0], [1.0, 1.0 + 1e-9] * 25])
def test_while_nothing_tells_examples_apart_the_order_is_random(scores):
    orders = {tuple(np.argsort(with_unseen(np.float32(scores), rng(seed)))) for seed in range(5)}
    assert len(orders) == 5


def test_what_was_seen_without_a_score_stays_unknown():
    scores, seen = np.float32([1.0, NAN, 3.0, NAN, -INF]), np.array([True, True, True, False, False])
    filled = with_unseen(scores, rng(), seen)
    assert np.isnan(filled[1])
    assert filled[3] in (1.0, 3.0)
    assert filled[4] == -INF


@pytest.mark.parametrize("value", [NAN, 2.0])
def test_a_random_order_is_not_for_what_is_never_chosen(value):
    scores = np.float32([value, value, NAN, -INF])
    seen = np.array([False, False, True, False])
    filled = with_unseen(scores, rng(), seen)
    assert np.isfinite(filled[:2]).all()
    assert np.isnan(filled[2])
    assert filled[3] == -INF


def test_where_nothing_has_a_score_all_are_alike():
    filled = with_unseen(np.float32([NAN, NAN, INF]), rng(), np.ones(3, dtype=bool))
    assert np.isfinite(filled[:2]).all()
    assert filled[2] == INF


@pytest.mark.parametrize("known", [[1.0, 1.0], [1.0, 0.0], [1.0], []])
def test_a_decision_stays_a_decision(known):
    scores = np.float32([*known, NAN, -INF, INF])
    filled = with_unseen(scores, rng())
    assert filled[-2:].tolist() == [-INF, INF]
    assert np.isfinite(filled[:-2]).all()


# ---- Equal scores ----


def test_equal_scores_are_told_apart_by_a_second_and_then_a_draw():
    scores = np.float32([1, 0, 1, 0, 1, NAN, -INF, 2])
    second = np.float32([3, 1, 9, NAN, 3, 0, 0, 0])
    draws = set()
    for seed in range(20):
        places = untied(scores, rng(seed), second)
        assert np.isnan(places[5])
        assert places[6] == -INF
        order = np.argsort(-places[[0, 1, 2, 3, 4, 7]]).tolist()
        # Position 5 is the score 2; then 2 (second 9), 0 and 4 in any order, 1 before 3, whose second is unknown.
        assert order[0] == 5
        assert order[1] == 2
        assert set(order[2:4]) == {0, 4}
        assert order[4:] == [1, 3]
        draws.add(tuple(order))
    assert len(draws) == 2


def test_scores_without_ties_are_passed_through():
    scores = np.float32([0.5, NAN, 1.0, -INF])
    assert untied(scores, rng()) is scores


def test_the_order_of_the_file_decides_nothing():
    """Of 1,000 equal scores half is kept: as many of the first rows as of the last ones, the same in every plan."""
    method, scores = Scored(keep=0.5), np.repeat(np.float32([1, 0]), [500, 500])
    scores[:250] = 0
    run = run_of(scores)
    masks = []
    for run.epoch in range(2):
        for run.plans_made in range(2):
            masks.append(method.select(run))
    assert all((mask == masks[0]).all() for mask in masks)
    assert masks[0].sum() == 500
    assert masks[0][250:500].all(), "the best are all kept"
    assert 50 < masks[0][:250].sum() < 120
    assert masks[0][:250].sum() + masks[0][500:].sum() == 250
    strict = Scored(action="curriculum", pacing="none").order(run, np.arange(1000))
    assert np.abs(np.corrcoef(strict[250:], np.arange(750))[0, 1]) < 0.7
    assert (np.diff(scores[strict]) <= 0).all()


def test_what_scores_do_not_say_is_said():
    told, logged = [], []
    run = make_run(4, log=logged.append, tell=lambda key, text, level: told.append((key, text, level)))
    tell_ties(run, "x", np.float32([1, 2, NAN, -INF]))
    assert told == []
    assert logged == [{"x_tied": 0}]
    tell_ties(run, "x", np.float32([1, 1, 2, -INF]))
    assert logged[1] == {"x_tied": 2}
    key, text, level = told[0]
    assert (key, level) == ("x:ties", logging.INFO)
    assert "2 of 3 known scores" in text
    assert "seed 0" in text
    tell_ties(run, "x", np.float32([1, 1, NAN, -INF]))
    assert told[1][0] == "x:constant"
    assert told[1][2] == logging.WARNING
    assert "all 2 known scores are 1" in told[1][1]


def test_known_scores_are_passed_through():
    scores = np.float32([3.0, 1.0, 2.0])
    assert with_unseen(scores, rng()) is scores


def test_keeping_the_best():
    scores = np.float32([0.1, NAN, 0.9, 0.5, INF, -INF, 0.7])
    assert np.flatnonzero(keep_top(scores, 0.5)).tolist() == [2, 6]
    assert np.flatnonzero(keep_top(scores, 1.0)).tolist() == [0, 2, 3, 6]
    assert np.flatnonzero(keep_top(scores, 0.5, count=3)).tolist() == [2, 3, 6]
    assert keep_top(scores, 1e-9).sum() == 1


def test_ties_go_to_the_lower_id():
    assert np.flatnonzero(keep_top(np.float32([1, 2, 2, 2, 0]), 0.4)).tolist() == [1, 2]
    assert in_order(np.float32([1, 2, 2, NAN, 0]), np.array([4, 3, 2, 1, 0])).tolist() == [1, 2, 0, 4, 3]


def test_keeping_a_band():
    scores = np.float32([9, 1, 7, 3, 5, NAN, 2, 8])
    kept = np.flatnonzero(keep_band(scores, 0.25, 0.75)).tolist()
    assert set(kept) <= {3, 4, 2, 6, 7}
    assert 1 not in kept
    assert 0 not in kept
    assert 5 not in kept


def test_order_is_within_the_ids_given():
    assert in_order(np.float32([5, 4, 3, 2, 1]), np.array([4, 0, 2])).tolist() == [0, 2, 4]


# ---- Pacing ----


@pytest.mark.parametrize("size", [1, 7, 100, 1003])
@pytest.mark.parametrize(
    "fraction", [lambda p: 1.0, lambda p: max(0.1, p), lambda p: 0.0, lambda p: 0.3 + 0.7 * (p > 0.5)]
)
def test_pacing_serves_every_id_once(size, fraction):
    scores = rng(1).normal(size=size).astype(np.float32)
    planned = paced(scores, np.arange(size), fraction, served=0, epoch_length=size, rng=rng(2))
    assert sorted(planned.tolist()) == list(range(size))


def test_pacing_never_serves_from_outside_the_open_share():
    size, blocks = 1000, 100
    scores = rng(3).permutation(size).astype(np.float32)
    rank = np.empty(size, dtype=int)
    rank[np.argsort(-scores)] = np.arange(size)

    def fraction(progress):
        return 0.2 + 0.8 * min(1.0, progress / 0.6)

    planned = paced(scores, np.arange(size), fraction, served=0, epoch_length=size, rng=rng(4), blocks=blocks)
    for position, id_ in enumerate(planned.tolist()):
        start = position // (size // blocks) * (size // blocks)
        assert rank[id_] < np.ceil(fraction(start / size) * size)
    # Within the open share the order is random, not the rank.
    assert np.corrcoef(rank[planned[:200]], np.arange(200))[0, 1] < 0.9
    early, late = rank[planned[:300]].mean(), rank[planned[-300:]].mean()
    assert early < late


def test_a_plan_made_inside_an_epoch_goes_on_at_its_pace():
    size = 100
    scores = -np.arange(size, dtype=np.float32)
    served = np.arange(40)
    left = np.setdiff1d(np.arange(size), served)
    planned = paced(scores, left, lambda p: p + 0.1, served=40, epoch_length=size, rng=rng(5))
    assert sorted(planned.tolist()) == left.tolist()
    # At progress 0.4 half of the epoch's hundred are open: ids below 50 only.
    assert planned[0] < 50


def test_a_share_that_is_too_small_still_serves():
    planned = paced(np.float32([1, 3, 2]), np.arange(3), lambda p: 0.0, served=0, epoch_length=3, rng=rng(6))
    assert planned.tolist() == [1, 2, 0]


# ---- The shared actions ----


@dataclass
class Scored(ByScore):
    """A method with fixed scores."""

    name = "scored"

    def scores(self, run):
        return known_scores(run, self.name)

    def score(self, batch):
        return batch


def run_of(scores):
    ledger = Ledger(len(scores))
    ledger.write("scored", None, scores, step=0)
    return make_run(len(scores), ledger=ledger, seed=3)


SCORES = np.float32([0.3, 0.9, 0.1, 0.7, 0.5, 0.2, 0.8, 0.4])


@pytest.mark.parametrize(
    ("parameters", "kept"),
    [
        ({}, [1, 3, 4, 6]),
        ({"keep": 0.25}, [1, 6]),
        ({"action": "keep_bottom", "keep": 0.25}, [2, 5]),
        ({"action": "band", "low": 0.25, "high": 0.75}, [0, 3, 4, 7]),
    ],
)
def test_actions_that_keep(parameters, kept):
    method = Scored(**parameters)
    assert "select" in method.hooks
    assert not method.hooks & {"order", "weigh"}
    mask = method.select(run_of(SCORES))
    assert np.flatnonzero(mask).tolist() == kept
    assert method.epoch_size(run_of(SCORES)) == len(kept)


def half_unknown():
    """Four examples with a score and four that were seen and have none."""
    run = run_of(np.where(np.arange(8) % 2 == 0, SCORES, NAN))
    run.ledger.visit(np.arange(8))
    return run


@pytest.mark.parametrize(("keep", "kept"), [(0.25, [4, 6]), (0.5, [0, 2, 4, 6]), (1.0, [0, 2, 4, 6])])
def test_seen_examples_without_a_score_are_not_kept(keep, kept):
    assert np.flatnonzero(Scored(keep=keep).select(half_unknown())).tolist() == kept


@pytest.mark.parametrize("action", ["sample", "curriculum"])
def test_seen_examples_without_a_score_come_last(action):
    method = Scored(action=action, pacing="none")
    ids = method.order(half_unknown(), np.arange(8))
    assert sorted(ids[:4]) == [0, 2, 4, 6]
    assert sorted(ids[4:]) == [1, 3, 5, 7]


def test_weights_follow_the_score():
    method = Scored(action="weight", temperature=0.5)
    assert "weigh" in method.hooks
    assert method.epoch_size(run_of(SCORES)) is None
    weights = method.weigh(torch.tensor([-1.0, 0.0, 1.0]))
    torch.testing.assert_close(weights, torch.sigmoid(torch.tensor([-2.0, 0.0, 2.0])))


def test_sampling_prefers_high_scores_and_repeats_nothing():
    method = Scored(action="sample", temperature=0.1)
    run = run_of(SCORES)
    first = []
    for run.plans_made in range(60):
        ids = method.order(run, np.arange(8))
        assert sorted(ids) == list(range(8))
        first.append(SCORES[ids[0]])
    assert np.mean(first) > 0.75
    assert len(set(first)) > 1


@pytest.mark.parametrize(
    ("reverse", "expected"), [(False, [1, 6, 3, 4, 7, 0, 5, 2]), (True, [2, 5, 0, 7, 4, 3, 6, 1])]
)
def test_a_strict_curriculum(reverse, expected):
    method = Scored(action="curriculum", pacing="none", reverse=reverse)
    assert method.order(run_of(SCORES), np.arange(8)).tolist() == expected


def test_a_paced_curriculum_opens_by_its_function():
    method = Scored(action="curriculum", pacing="root", start=0.2, full_at=0.5)
    for progress in (0.0, 0.1, 0.3, 0.5, 0.9):
        expected = pacing_size("root", progress * 10_000, 10_000, 10_000, initial_fraction=0.2, full_at=0.5) / 10_000
        assert method.open_share(progress) == pytest.approx(expected, abs=1e-3)
    assert method.open_share(0.5) == 1.0


def test_a_choice_made_once_is_kept_over_a_resume():
    method, run = Scored(refresh="never"), run_of(SCORES)
    first = method.select(run).copy()
    run.ledger.write("scored", None, -SCORES, step=1)
    assert (method.select(run) == first).all()
    other = Scored(refresh="never")
    other.load_state_dict(method.state_dict())
    assert (other.select(run) == first).all()
    assert (Scored().select(run) != first).any()


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"action": "keep"}, "action='keep'"),
        ({"keep": 0}, "keep=0"),
        ({"low": 0.8, "high": 0.3}, r"low=0\.8 is not below high=0\.3"),
        ({"temperature": 0}, "temperature=0"),
        ({"pacing": "slow"}, "pacing='slow'"),
        ({"start": 0}, "start=0"),
        ({"refresh": 0}, "refresh=0"),
        ({"refresh": "step"}, "refresh='step'"),
    ],
)
def test_parameters_are_checked(parameters, message):
    with pytest.raises(ValueError, match=message):
        Scored(**parameters)


@pytest.mark.parametrize("seed", range(20))
def test_a_band_cut_at_its_ends_is_the_ranked_one(seed):
    rng = np.random.default_rng(seed)
    scores = (rng.integers(0, rng.choice([2, 5, 50]), 30) / 7).astype(np.float32)
    scores[rng.random(30) < 0.2] = rng.choice([np.nan, np.inf])
    low, high = sorted(rng.choice([0.0, 0.2, 0.25, 0.5, 0.51, 0.9, 1.0], 2, replace=False))
    inside = band(scores, low, high)
    assert np.flatnonzero(keep_band(scores, low, high)).tolist() == sorted(inside.tolist())
    drawn = keep_band(scores, low, high, np.random.default_rng(1))
    assert sorted(scores[drawn]) == sorted(scores[inside])


@pytest.mark.parametrize("seed", range(20))
def test_an_order_draws_between_equal_scores_however_the_ids_come(seed):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 6, 40).astype(np.float32)
    scores[rng.random(40) < 0.2] = np.nan
    ids = rng.permutation(40)[:30]
    order = in_order(scores, ids, np.random.default_rng(1))
    known = int(np.isfinite(scores[ids]).sum())
    assert sorted(order) == sorted(ids)
    assert np.isnan(scores[order][known:]).all()
    assert (np.diff(scores[order][:known]) <= 0).all()
    assert order.tolist() == in_order(scores, ids[::-1], np.random.default_rng(1)).tolist()
    others = [in_order(scores, ids, np.random.default_rng(k)).tolist() for k in range(2, 6)]
    assert any(other != order.tolist() for other in others)
