import math

import numpy as np
import pytest

from dsel_trl.functional.preference.inco_dpo import balanced_scores, choose_pair, prefix_length

NAN = math.nan


@pytest.mark.parametrize(
    ("length", "ratio", "expected"),
    [(7, 0.5, 3), (10, 0.3, 3), (100, 0.29, 29), (1, 0.5, 0), (0, 0.5, 0), (8, 0.0, 0), (8, 1.0, 8)],
)
def test_prefix_is_a_floored_share(length, ratio, expected):
    assert prefix_length(length, ratio) == expected


def test_fixed_prefix_is_cut_to_the_response():
    assert prefix_length(100, tokens=64) == 64
    assert prefix_length(10, tokens=64) == 10
    assert prefix_length(10, tokens=0) == 0


@pytest.mark.parametrize(("length", "ratio"), [(5, 1.1), (5, -0.1), (-1, 0.5)])
def test_prefix_refuses_nonsense(length, ratio):
    with pytest.raises(ValueError, match=str(ratio if length > 0 else length)):
        prefix_length(length, ratio)


def test_balanced_scores():
    np.testing.assert_allclose(balanced_scores([0.2, 0.1], [-4.0, -1.0]), [0.0, 0.05])


def test_best_against_worst():
    assert choose_pair([0.3, 0.9, 0.1]) == (1, 2)
    assert choose_pair([0.3, 0.9, 0.1], scores=[0.5, 0.2, 0.4]) == (0, 2)
    assert choose_pair([0.3, 0.9, 0.1], rejectable=[True, True, False]) == (1, 0)


def test_ties_take_the_outer_indices():
    assert choose_pair([0.9, 0.1, 0.9, 0.1]) == (0, 3)


def test_nan_rewards_are_left_out():
    assert choose_pair([NAN, 0.2, 0.4, NAN]) == (2, 1)


@pytest.mark.parametrize("rewards", [[], [0.5], [0.5, NAN], [0.5, 0.5], [NAN, NAN]])
def test_no_pair(rewards):
    assert choose_pair(rewards) is None


def test_a_candidate_cannot_be_both_sides():
    assert choose_pair([0.1, 0.2], scores=[1.0, 0.0]) is None
    assert choose_pair([0.1, 0.2], rejectable=[False, False]) is None
