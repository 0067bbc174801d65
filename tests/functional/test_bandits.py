"""Bandits: what the traces of the oracle do not say."""

import numpy as np
import pytest

from dsel_trl.functional.bandits import best_arms, draw_in_rounds, pull, ucb_scores


def test_what_was_never_pulled_comes_first_and_the_rest_by_means_and_pulls():
    scores = ucb_scores(np.array([0, 4, 1, 4]), np.array([np.nan, 0.0, 0.0, 0.1]))
    assert best_arms(scores, 4).tolist() == [0, 2, 3, 1]
    assert best_arms(ucb_scores(np.array([4, 1]), np.array([0.1, 0.0]), alpha=0.0), 1).tolist() == [0]
    # One pull so far: the logarithm is 0, and so is the bonus.
    assert ucb_scores(np.array([1, 0]), np.array([0.5, 0.0]))[0] == 0.5


def test_ties_go_to_the_lower_arm_and_unknown_scores_and_spent_arms_never_win():
    assert best_arms(np.array([1.0, np.nan, 1.0, 2.0]), 3).tolist() == [3, 0, 2]
    assert best_arms(np.array([1.0, np.inf, 1.0]), 2, np.array([True, False, True])).tolist() == [0, 2]
    assert best_arms(np.array([1.0, 2.0]), 2, np.array([False, False])).tolist() == []


def test_rewards_are_discounted_and_unknown_ones_are_no_pulls():
    pulls, means = np.zeros(3, dtype=np.int64), np.zeros(3)
    for reward in (1.0, 0.0, 3.0):
        pulls, means = pull(pulls, means, np.array([0, 1]), np.array([reward, np.nan]), discount=0.2)
    assert pulls.tolist() == [3, 0, 0]
    assert means[0] == pytest.approx(0.8 * 0.8 * 1.0 + 0.2 * 3.0)
    plain = np.zeros(3, dtype=np.int64), np.zeros(3)
    for reward in (1.0, 0.0, 3.0):
        plain = pull(*plain, np.array([2]), np.array([reward]))
    assert plain[1][2] == pytest.approx(4 / 3)


def drawn(pulls, means, seed=0, **how):
    labels = np.repeat([0, 1, 2, -1], [10, 3, 10, 2])
    given = {"arms": 1, "draws": 4, "alpha": 0.0, "limit": 100, **how}
    ids = 100 + np.arange(25)
    found = draw_in_rounds(ids, labels, np.array(pulls), np.array(means), rng=np.random.default_rng(seed), **given)
    assert sorted(found) == ids.tolist()
    return labels[found - 100].tolist(), found


def test_the_best_arm_is_drawn_until_it_is_spent_and_what_has_no_arm_comes_last():
    labels, _ = drawn([5, 5, 5], [0.0, 1.0, 2.0])
    assert labels == [2] * 10 + [1] * 3 + [0] * 10 + [-1] * 2


def test_rounds_of_one_plan_spread_where_rewards_are_still_to_come():
    labels, _ = drawn([1, 1, 1], [0.0, 0.0, 0.1], alpha=1.0)
    assert labels[:4] == [2] * 4
    assert set(labels[:11]) == {0, 1, 2}
    # Never pulled: each arm once before any comes again.
    labels, _ = drawn([0, 0, 0], [0.0, 0.0, 0.0], alpha=1.0)
    assert labels[:11] == [0] * 4 + [1] * 3 + [2] * 4


def test_arms_of_a_round_are_mixed_and_the_draw_is_random():
    labels, found = drawn([5, 5, 5], [2.0, 0.0, 2.0], arms=2, draws=8)
    assert sorted(labels[:16]) == [0] * 8 + [2] * 8
    assert labels[:16] not in ([0] * 8 + [2] * 8, [2] * 8 + [0] * 8)
    assert found.tolist() != drawn([5, 5, 5], [2.0, 0.0, 2.0], seed=1, arms=2, draws=8)[1].tolist()


def test_after_the_limit_the_order_is_random():
    labels, _ = drawn([5, 5, 5], [0.0, 1.0, 2.0], limit=8)
    assert labels[:8] == [2] * 8
    assert labels[8:] != sorted(labels[8:], reverse=True)
