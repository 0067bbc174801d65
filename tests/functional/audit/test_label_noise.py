"""Opinions and the probability made of them, on data whose truth is known."""

import numpy as np
import pytest

from dsel_trl.functional.audit.label_noise import (
    NoiseModel,
    agreement_probability,
    agreement_weights,
    area_under_curve,
    expected_calibration_error,
    fit_noise_model,
    noise_rate_bounds,
    reliability,
    wrong_probability,
)
from dsel_trl.scorers.label_audit import AuditSettings, PairFeatures, audit_labels


def labelled(size, rate, seed=0):
    """Opinions on labels of which a share is wrong: the truth follows them with a slope of 3."""
    rng = np.random.default_rng(seed)
    latent = rng.normal(size=size)
    truth = rng.random(size) < 1 / (1 + np.exp(-3 * latent))
    wrong = rng.random(size) < rate
    label = truth ^ wrong
    return np.where(label, latent, -latent), wrong


@pytest.mark.parametrize("rate", [0.1, 0.3])
def test_the_probability_is_that_of_a_wrong_label(rate):
    opinions, wrong = labelled(20_000, rate)
    model = fit_noise_model(opinions, rate)
    assert model.slope == pytest.approx(3, abs=0.4)
    chance = wrong_probability(opinions, model)
    assert chance.mean() == pytest.approx(rate, abs=0.02)
    assert expected_calibration_error(chance, wrong) < 0.02
    # Bayes: what agrees with a label may still be wrong, and the odds are those of the share.
    assert wrong_probability(np.zeros(1), model)[0] == pytest.approx(rate)
    agreement = agreement_probability(opinions, model)
    assert agreement.min() >= rate
    assert agreement.max() <= 1 - rate


def test_the_share_of_wrong_labels_lies_between_what_the_surest_and_what_all_opinions_contradict():
    for rate in (0.0, 0.2, 0.4):
        opinions, _ = labelled(20_000, rate, seed=1)
        low, high = noise_rate_bounds(opinions)
        assert low == pytest.approx(rate, abs=0.03)
        assert high == pytest.approx(float(np.mean(opinions < 0)), abs=1e-3)
        assert low <= high
    assert noise_rate_bounds(-np.ones(50)) == (0.49, 0.49)


def test_labels_that_are_wrong_in_a_way_that_can_be_learned_lie_below_the_middle():
    # A judge who prefers the longer response: what is surest never contradicts him, what is unsure does.
    length = np.random.default_rng(3).normal(size=4000)
    opinions = np.abs(length) * np.where(np.abs(length) < 0.5, np.random.default_rng(4).choice([-1, 1], 4000), 1)
    low, high = noise_rate_bounds(opinions)
    assert low < 0.01
    assert high > 0.15


def test_weights_follow_what_agrees():
    opinions = np.array([[1.0, 1.0, 1.0, -1.0], [1.0, -1.0, 1.0, -1.0], [-1.0, -1.0, -1.0, 1.0]])
    assert agreement_weights(opinions).tolist() == [1.0, 0.0, 0.0]
    assert agreement_weights(-np.ones((2, 3))).tolist() == [0.5, 0.5]


def test_calibration_and_area_on_small_examples():
    foretold, seen, sizes = reliability(np.array([0.1, 0.2, 0.8, 0.9]), np.array([False, False, True, True]), bins=2)
    assert foretold == pytest.approx([0.15, 0.85])
    assert seen.tolist() == [0.0, 1.0]
    assert sizes.tolist() == [2, 2]
    error = expected_calibration_error(np.array([0.1, 0.2, 0.8, np.nan]), np.array([False, False, True, True]), 2)
    assert error == pytest.approx((2 * 0.15 + 0.2) / 3)
    assert area_under_curve(np.array([0.0, 1.0, 1.0, 2.0]), np.array([False, False, True, True])) == 0.875
    assert np.isnan(area_under_curve(np.array([1.0]), np.array([True])))


def test_a_share_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"0\.5"):
        fit_noise_model(np.ones(3), 0.5)
    assert NoiseModel(1.0, 0.2).rate == 0.2


def test_signals_that_tell_no_responses_apart_are_an_error():
    size = 40
    zeros = np.zeros((size, 5), dtype=np.float32)
    features = PairFeatures(np.arange(size), zeros, zeros[:, :2], np.zeros(size, dtype=np.float32))
    with pytest.raises(ValueError, match=r"signals=\['comparisons'\] tell no two responses apart"):
        audit_labels(features, AuditSettings(signals=("comparisons",)))
