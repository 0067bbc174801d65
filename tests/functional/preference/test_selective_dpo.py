import math

import numpy as np
import pytest

from dsel_trl.functional.preference.selective_dpo import (
    half_split,
    learned_step,
    mean_validation_loss,
    pool_fraction,
    rank_in_length_buckets,
    stable_id,
    values_by_id,
)

NAN = math.nan


def test_the_worked_example():
    difficulty = mean_validation_loss([[0.40, 0.90, 0.40, 0.20], [0.44, NAN, 0.44, 0.30]])
    assert difficulty.tolist() == pytest.approx([0.42, 0.90, 0.42, 0.25])


def test_values_are_found_by_id():
    found = values_by_id(["b", "a", "x", "b"], ["a", "b", "a"], [1.0, NAN, 9.0])
    np.testing.assert_array_equal(found, [NAN, 1.0, NAN, NAN])
    assert values_by_id(["x", "a"], ["a"], [3])[1] == 3.0
    with pytest.raises(ValueError, match="shorter"):
        values_by_id(["a"], ["a", "b"], [1.0])


def test_an_infinite_loss_is_not_averaged_away_and_an_unknown_one_stays_unknown():
    assert mean_validation_loss([[math.inf, 9.0], [0.1, NAN]]).tolist() == [math.inf, 9.0]
    assert math.isnan(mean_validation_loss([[NAN], [NAN]])[0])


def test_every_example_is_scored_once_per_seed_by_a_model_that_has_not_seen_it():
    split = half_split(11, seed=41)
    assert sorted(np.concatenate([split.first_eval, split.second_eval]).tolist()) == list(range(11))
    assert not set(split.first_eval) & set(split.first_train)
    assert not set(split.second_eval) & set(split.second_train)
    assert len(split.first_eval) == 5
    assert half_split(11, seed=42).permutation.tolist() != split.permutation.tolist()


def test_half_split_leaves_the_global_generator_alone():
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    half_split(10, seed=7)
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002


def test_learned_step_is_strict_and_needs_the_margin_to_stay():
    margins = [
        [0.5, 0.5, 0.5],
        [0.5, 0.4, 0.5],  # equal to delta is not above it
        [0.5, 0.5, 0.1],
        [0.1, NAN, 0.5],
        [0.5, 0.5, NAN],
    ]
    assert learned_step(margins).tolist() == [0, 2, 3, 2, 3]
    with pytest.raises(ValueError, match=r"\(3,\)"):
        learned_step([0.5, 0.5, 0.5])


def test_pacing_is_linear_and_ends_at_keep():
    assert pool_fraction(0.0) == pytest.approx(0.1)
    assert pool_fraction(0.4) == pytest.approx(0.3)
    assert pool_fraction(0.8) == pool_fraction(1.0) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="0"):
        pool_fraction(0.5, full_at=0)


def test_length_buckets_rank_each_length_on_its_own():
    difficulty = [0.1, 0.2, 0.9, 0.8, NAN, 0.8]
    lengths = [5, 4, 100, 110, 3, 120]
    ranks = rank_in_length_buckets(difficulty, lengths, n_buckets=2)
    # short: ids 1, 0, 2 (lengths 4, 5, 100); long: ids 3, 5
    np.testing.assert_allclose(ranks, [0.0, 1 / 3, 2 / 3, 0.0, NAN, 0.5])


def test_stable_id_is_the_sha256():
    assert stable_id("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
