import math

import numpy as np
import pytest

from dsel_trl.functional.loss.select_k_of_b import MODES, at_or_above, select_k_of_b

NAN = math.nan
SCORES = [0.5, NAN, 2.0, -1.0, 2.0]


def test_deterministic_modes():
    assert select_k_of_b(SCORES, 3).tolist() == [2, 4, 0]
    assert select_k_of_b(SCORES, 2, "bottom_k").tolist() == [3, 0]
    assert select_k_of_b(SCORES, 2, "threshold", quantile=0.5).tolist() == [2, 4]
    assert select_k_of_b(SCORES, 2, "epsilon_mix", epsilon=0.0).tolist() == [2, 4]
    assert select_k_of_b(SCORES, 2, "gumbel_top_k", temperature=0.0).tolist() == [2, 4]


@pytest.mark.parametrize("mode", MODES)
def test_nan_rows_are_never_taken(mode):
    rng = np.random.default_rng(0)
    for _ in range(50):
        picked = select_k_of_b(SCORES, 4, mode, epsilon=0.5, rng=rng).tolist()
        assert 1 not in picked
        assert len(set(picked)) == len(picked)
    assert select_k_of_b([NAN, NAN], 1, mode, rng=rng, fill=True).tolist() == []


def test_fill_repeats_valid_rows_only():
    assert len(select_k_of_b(SCORES, 9)) == 4
    picked = select_k_of_b(SCORES, 9, fill=True, rng=np.random.default_rng(0)).tolist()
    assert len(picked) == 9
    assert picked[:4] == [2, 4, 0, 3]
    assert 1 not in picked
    with pytest.raises(ValueError, match="rng"):
        select_k_of_b(SCORES, 9, fill=True)


def test_threshold_of_ties_and_of_nothing():
    assert at_or_above([1.0, 1.0, NAN], 0.9).tolist() == [0, 1]
    assert at_or_above([NAN], 0.5).tolist() == []


def test_unknown_mode():
    with pytest.raises(ValueError, match="'best'"):
        select_k_of_b(SCORES, 1, "best")
