import math

import numpy as np
import pytest

from dsel_trl.functional.ranking import (
    band,
    bottom_k,
    epsilon_mix,
    gumbel_top_k,
    keep_count,
    rank_order,
    selectable,
    softmax_weights,
    threshold,
    top_k,
    zscore,
)

NAN, INF = math.nan, math.inf
MIXED = [2.0, NAN, 5.0, 2.0, INF, -1.0, 5.0, -INF]


def test_only_finite_scores_are_selectable():
    assert selectable(MIXED).tolist() == [True, False, True, True, False, True, True, False]


def test_scores_must_be_one_dimensional():
    with pytest.raises(ValueError, match=r"\(2, 1\)"):
        selectable([[1.0], [2.0]])


@pytest.mark.parametrize(
    ("fraction", "n", "expected"),
    [
        (0.3, 10, 3),
        (0.29, 100, 29),
        (0.4, 10, 4),
        (0.01, 10, 1),
        (1.0, 7, 7),
        (0.5, 0, 0),
        (0.5, 7, 3),
        (0.999, 10, 9),
    ],
)
def test_keep_count_floors_without_float_error(fraction, n, expected):
    assert keep_count(fraction, n) == expected


def test_keep_count_is_exact_for_large_data():
    assert keep_count(0.29, 100_000_000) == 29_000_000
    assert keep_count(0.28999999999, 100_000_000) == 28_999_999


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.5, NAN])
def test_keep_count_names_a_wrong_fraction(fraction):
    with pytest.raises(ValueError, match=str(fraction)):
        keep_count(fraction, 10)


def test_zscore_uses_the_population_deviation():
    # mean 2, population variance 2/3
    np.testing.assert_allclose(zscore([1.0, 2.0, 3.0]), [-math.sqrt(1.5), 0.0, math.sqrt(1.5)])


def test_zscore_ignores_non_finite_entries():
    np.testing.assert_allclose(zscore([0.0, NAN, 2.0, INF]), [-1.0, NAN, 1.0, NAN])


@pytest.mark.parametrize("value", [0.0, 0.1, 1e8, -3.3])
def test_zscore_of_a_constant_is_zero(value):
    assert zscore([value] * 7).tolist() == [0.0] * 7


def test_rank_order_sorts_ties_by_id_and_the_unselectable_last():
    assert rank_order(MIXED).tolist() == [2, 6, 0, 3, 5, 1, 4, 7]
    assert rank_order(MIXED, descending=False).tolist() == [5, 0, 3, 2, 6, 1, 4, 7]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int64])
@pytest.mark.parametrize("descending", [True, False])
def test_rank_order_equals_a_stable_sort(dtype, descending):
    rng = np.random.default_rng(0)
    scores = (rng.integers(-20, 20, size=500) / 4).astype(dtype)
    expected = sorted(range(500), key=lambda i: (-scores[i] if descending else scores[i], i))
    assert rank_order(scores, descending).tolist() == expected


def test_negative_zero_ties_with_zero():
    assert rank_order(np.array([0.0, -0.0, 0.0], dtype=np.float32)).tolist() == [0, 1, 2]
    assert rank_order(np.array([0.0, -0.0, 0.0], dtype=np.float32), descending=False).tolist() == [0, 1, 2]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("k", [1, 2, 37, 399, 10_000])
def test_top_and_bottom_k_are_the_ends_of_the_order(dtype, k):
    rng = np.random.default_rng(1)
    scores = rng.integers(0, 12, size=400).astype(dtype)
    scores[::7] = np.nan
    valid = int(np.isfinite(scores).sum())
    assert top_k(scores, k).tolist() == rank_order(scores)[: min(k, valid)].tolist()
    assert bottom_k(scores, k).tolist() == rank_order(scores, descending=False)[: min(k, valid)].tolist()


def test_top_k_never_takes_nan_and_clamps_k():
    assert top_k(MIXED, 3).tolist() == [2, 6, 0]
    assert bottom_k(MIXED, 2).tolist() == [5, 0]
    assert top_k(MIXED, 100).tolist() == [2, 6, 0, 3, 5]
    assert top_k(MIXED, 0).tolist() == [2]
    assert top_k([NAN, INF], 1).tolist() == []
    assert top_k([], 3).tolist() == []
    with pytest.raises(ValueError, match="-1"):
        top_k(MIXED, -1)


def test_band_takes_rank_fractions():
    scores = [9.0, 1.0, 3.0, NAN, 7.0, 5.0]
    assert band(scores, 0.0, 1.0).tolist() == [1, 2, 5, 4, 0]
    assert band(scores, 0.2, 0.6).tolist() == [2, 5]
    assert band(np.arange(10.0), 0.1, 0.3).tolist() == [1, 2]  # 0.1 * 3 is 0.30000000000000004
    assert band([1.0, 2.0], 0.6, 0.7).tolist() == [1]
    assert band([NAN], 0.0, 1.0).tolist() == []


def test_adjacent_bands_cover_everything_once():
    scores = np.random.default_rng(2).normal(size=97)
    parts = [band(scores, low, high) for low, high in [(0.0, 0.33), (0.33, 0.66), (0.66, 1.0)]]
    assert np.concatenate(parts).tolist() == rank_order(scores, descending=False).tolist()


@pytest.mark.parametrize(("low", "high"), [(0.5, 0.5), (-0.1, 0.5), (0.2, 1.1), (0.8, 0.2)])
def test_band_refuses_wrong_ends(low, high):
    with pytest.raises(ValueError, match=f"low={low}, high={high}"):
        band([1.0], low, high)


def test_threshold_interpolates_over_finite_scores():
    assert threshold([1.0, 2.0, NAN, 4.0, INF], 0.75) == 3.0
    assert math.isnan(threshold([NAN], 0.5))
    with pytest.raises(ValueError, match=r"1\.5"):
        threshold([1.0], 1.5)


def test_gumbel_top_k_adds_the_noise_to_the_scaled_scores():
    scores, noise = [1.0, 2.0, NAN, 0.0], [0.0, -3.0, 9.0, 1.5]
    assert gumbel_top_k(scores, 2, 1.0, noise=noise).tolist() == [3, 0]  # keys 1, -1, NaN, 1.5
    assert gumbel_top_k(scores, 2, 0.1, noise=noise).tolist() == [1, 0]  # keys 10, 17, NaN, 1.5


def test_gumbel_top_k_limits():
    scores = [3.0, 1.0, 2.0]
    assert gumbel_top_k(scores, 2, 0.0).tolist() == [0, 2]
    with pytest.raises(ValueError, match="rng"):
        gumbel_top_k(scores, 2)
    with pytest.raises(ValueError, match="-1"):
        gumbel_top_k(scores, 2, -1.0)


def test_gumbel_top_k_draws_from_the_softmax():
    rng = np.random.default_rng(3)
    scores = np.log([0.7, 0.2, 0.1])
    first = [gumbel_top_k(scores, 1, rng=rng)[0] for _ in range(3000)]
    np.testing.assert_allclose(np.bincount(first) / 3000, [0.7, 0.2, 0.1], atol=0.03)


def test_epsilon_mix_goes_from_greedy_to_uniform():
    order = np.array([4, 2, 7, 0, 9])
    assert epsilon_mix(order, 3, 0.0).tolist() == [4, 2, 7]
    rng = np.random.default_rng(4)
    picks = np.array([epsilon_mix(order, 3, 1.0, rng) for _ in range(2000)])
    for slot in range(3):
        shares = [(picks[:, slot] == i).mean() for i in order]
        np.testing.assert_allclose(shares, 0.2, atol=0.04)


def test_epsilon_mix_never_repeats_and_keeps_its_share_of_the_best():
    order, rng = np.arange(50), np.random.default_rng(5)
    picks = [epsilon_mix(order, 50, 0.3, rng).tolist() for _ in range(20)]
    assert all(sorted(pick) == order.tolist() for pick in picks)
    first = [epsilon_mix(order, 1, 0.3, rng)[0] == 0 for _ in range(3000)]
    assert abs(np.mean(first) - (0.7 + 0.3 / 50)) < 0.03


def test_softmax_weights():
    scores = [0.0, NAN, math.log(3.0)]
    np.testing.assert_allclose(softmax_weights(scores), [0.25, 0.0, 0.75])
    np.testing.assert_allclose(softmax_weights(scores, normalize="mean1"), [0.5, 0.0, 1.5])
    np.testing.assert_allclose(softmax_weights(scores, normalize="none"), [1 / 3, 0.0, 1.0])
    np.testing.assert_allclose(softmax_weights(scores, temperature=0.5), [0.1, 0.0, 0.9])
    np.testing.assert_allclose(softmax_weights([1000.0, 999.0]), [1 / (1 + math.exp(-1)), 1 / (1 + math.e)])
    assert softmax_weights([NAN, INF]).tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match="mean2"):
        softmax_weights(scores, normalize="mean2")
