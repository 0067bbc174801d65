import math

import numpy as np
import pytest

from dsel_trl.functional.preference.bees import (
    fuse_margins,
    fuse_probabilities,
    margin_probability,
    select_fused,
    unclipped_evidence,
    upper_bound,
)

NAN = math.nan


def bound_by_definition(margins, divisor):
    largest = max(margins)
    x = int(largest / divisor)
    while True:
        count = sum(x < m <= largest for m in margins)
        if count < largest - x or count < 30 or x > largest:
            return x
        x += 1


@pytest.mark.parametrize("seed", range(5))
def test_upper_bound_follows_the_definition(seed):
    margins = np.random.default_rng(seed).gamma(2.0, 3.0, size=600) - 3
    assert upper_bound(margins, 1.5) == bound_by_definition(margins.tolist(), 1.5)
    assert upper_bound(margins, 2.0) == bound_by_definition(margins.tolist(), 2.0)


def test_the_tail_needs_thirty_margins():
    # int(8 / 2) = 4; 30 margins in (5, 8] are enough to move on to 6, where nothing is left but the 20 at 8.
    margins = [5.5] * 10 + [8.0] * 20 + [0.0] * 50
    assert upper_bound(margins, 2.0) == 6
    assert upper_bound(margins[1:], 2.0) == 4


def test_upper_bound_of_few_or_no_margins():
    assert upper_bound([9.0, 1.0, NAN], 2.0) == 4
    assert upper_bound([-3.0, -4.0], 2.0) == -1
    assert upper_bound([], 2.0) == 0
    with pytest.raises(ValueError, match="0"):
        upper_bound([1.0], 0)


def test_probability_by_hand():
    assert margin_probability([-5.0, -2.0, 0.0, 2.0, 9.0], -2, 2).tolist() == [0.0, 0.0, 0.5, 1.0, 1.0]
    assert margin_probability([-2.0, NAN, 9.0], -2, 8).tolist() == [0.0, 0.5, 1.0]
    assert margin_probability([-2.0, NAN, 9.0], -2, 8, missing="zero").tolist() == [0.0, 0.2, 1.0]
    assert margin_probability([0.0, 2.0], -2, 6).tolist() == [0.25, 0.5]
    assert margin_probability([0.0, 2.0], -2, 6, scale="observed").tolist() == [0.5, 1.0]


@pytest.mark.parametrize(("margins", "upper"), [([1.0, 2.0], -2), ([-3.0, -2.0], 5), ([NAN], 5)])
def test_a_source_without_information_is_one_half(margins, upper):
    assert margin_probability(margins, -2, upper).tolist() == [0.5] * len(margins)


def test_fusion():
    fused = fuse_probabilities([[0.8, 0.5, 0.5], [0.5, 0.9, 0.5]])
    np.testing.assert_allclose(fused, [0.8, 0.9, 0.5])
    np.testing.assert_allclose(fuse_probabilities([[0.8], [0.6]]), [0.48 / (0.48 + 0.08)])


def test_contradicting_sources_give_one_half_and_never_win():
    fused = fuse_probabilities([[1.0, 0.7], [0.0, 0.7]])
    assert fused[0] == pytest.approx(0.5)
    assert select_fused(fused, 1).tolist() == [1]
    unclamped = fuse_probabilities([[1.0, 0.7], [0.0, 0.7]], clamp=0.0)
    assert np.isnan(unclamped[0])
    assert select_fused(unclamped, 1).tolist() == [1]
    assert select_fused(unclamped, 1, nan_wins=True).tolist() == [0]


def test_ties_at_the_top_go_to_the_stronger_unclipped_evidence_then_to_the_lower_id():
    margins, uppers = [[8.0, 20.0, 8.0, 1.0], [8.0, 8.0, 8.0, 1.0]], [6.0, 6.0]
    fused = fuse_probabilities([margin_probability(m, -2.0, u) for m, u in zip(margins, uppers, strict=True)])
    evidence = unclipped_evidence(margins, -2.0, uppers)
    assert evidence[0] == pytest.approx(2 * 10 / 8)
    assert select_fused(fused, 3, evidence).tolist() == [1, 0, 2]
    assert select_fused(fused, 3).tolist() == [0, 1, 2]


def test_raw_fusions_and_missing_margins():
    margins = [[1.0, NAN], [-2.0, 3.0]]
    assert fuse_margins(margins, "add").tolist() == [-1.0, 3.0]
    assert fuse_margins(margins, "max").tolist() == [1.0, 3.0]
    assert fuse_margins(margins, "min").tolist() == [-2.0, 0.0]
    with pytest.raises(ValueError, match="'mean'"):
        fuse_margins(margins, "mean")
    with pytest.raises(ValueError, match=r"\[2, 1\]"):
        fuse_margins([[1.0, 2.0], [1.0]])
