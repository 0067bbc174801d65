import math

import numpy as np
import pytest

from dsel_trl.functional.preference.alignment_potential import alignment_potential, reward_spread
from dsel_trl.functional.ranking import top_k

NAN = math.nan


def test_reward_spread():
    np.testing.assert_allclose(
        reward_spread([[1.0, 4.0, 2.0], [3.0], [2.0, 2.0], [1.0, NAN], []]), [3, 0, 0, NAN, NAN]
    )


def test_raw_potential_by_hand():
    score = alignment_potential([3.0, -1.0], [-2.0, 0.5], normalize="none")
    assert score.tolist() == [1.0, 0.5]
    assert alignment_potential([3.0], [2.0], weight=2.5, normalize="none").tolist() == [-2.0]


def test_zscored_potential_by_hand():
    # |d| = 0, 2 -> z = -1, 1;  |m| = 1, 3 -> z = -1, 1
    assert alignment_potential([0.0, 2.0], [-1.0, 3.0]).tolist() == [0.0, 0.0]
    assert alignment_potential([0.0, 2.0], [3.0, 1.0]).tolist() == [-2.0, 2.0]
    assert alignment_potential([0.0, 2.0], [3.0, 1.0], weight=0.0).tolist() == [-1.0, 1.0]


def test_beta_and_the_reward_scale_do_not_matter_after_zscoring():
    rng = np.random.default_rng(0)
    d, m = rng.normal(size=50), rng.normal(size=50)
    np.testing.assert_allclose(alignment_potential(d, m), alignment_potential(7 * d, 0.01 * m))


def test_no_implicit_margin_leaves_the_explicit_one():
    d = np.array([1.0, -5.0, 3.0])
    assert top_k(alignment_potential(d, np.zeros(3)), 3).tolist() == [1, 2, 0]
    assert alignment_potential(np.ones(3), np.ones(3)).tolist() == [0.0] * 3


def test_missing_margins_are_not_selectable():
    score = alignment_potential([1.0, NAN, 3.0, 2.0], [1.0, 1.0, math.inf, 0.0])
    assert np.isnan(score).tolist() == [False, True, True, False]


def test_wrong_arguments():
    with pytest.raises(ValueError, match="2 explicit margins do not match 1"):
        alignment_potential([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="'rank'"):
        alignment_potential([1.0], [1.0], normalize="rank")
