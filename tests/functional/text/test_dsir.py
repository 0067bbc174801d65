import hashlib

import numpy as np
import pytest

from dsel_trl.functional.text.dsir import (
    bucket_counts,
    bucket_distribution,
    dsir_select,
    hash_bucket,
    hash_ngrams,
    inverse_probability_weights,
    log_importance_weights,
    tokenize_words,
)

TEXTS = ["a b a b", "", "Über-Straße 3,5!", "a"]


def counts_of(hashed, buckets):
    return np.stack([bucket_counts(text, buckets) for text in np.split(hashed.buckets, hashed.offsets[1:-1])])


def test_tokens():
    assert tokenize_words(TEXTS[2]) == ["über", "-", "straße", "3", ",", "5", "!"]
    assert tokenize_words("") == []


def test_bucket_is_sha256_modulo():
    assert hash_bucket("a b", 97) == int(hashlib.sha256(b"a b").hexdigest(), 16) % 97


def test_counts_by_hand():
    hashed = hash_ngrams(TEXTS, num_buckets=1000)
    assert np.diff(hashed.offsets).tolist() == [7, 0, 13, 1]
    assert hashed.num_words.tolist() == [4, 0, 7, 1]
    counts = counts_of(hashed, 1000)
    assert counts[0, hash_bucket("a", 1000)] == 2
    assert counts[0, hash_bucket("a b", 1000)] == 2
    assert counts[0, hash_bucket("b a", 1000)] == 1
    assert counts[1].sum() == 0
    assert np.diff(hash_ngrams(["a b c"], ngrams=3).offsets).tolist() == [6]


def test_weights_equal_the_dense_formula():
    hashed = hash_ngrams(TEXTS, num_buckets=50)
    raw, target = (
        bucket_distribution(hashed, 50),
        bucket_distribution(hash_ngrams(["a b"], num_buckets=50), 50, smoothing=1),
    )
    expected = counts_of(hashed, 50) @ (np.log(target + 1e-8) - np.log(raw + 1e-8))
    np.testing.assert_allclose(log_importance_weights(hashed, raw, target), expected)
    assert target.sum() == pytest.approx(1)


def test_target_equal_to_raw_gives_zero():
    hashed = hash_ngrams(TEXTS, num_buckets=50)
    distribution = bucket_distribution(hashed, 50)
    np.testing.assert_allclose(log_importance_weights(hashed, distribution, distribution), 0, atol=1e-6)


def test_greedy_choice_draws_nothing():
    weights = np.random.default_rng(0).standard_normal(50).round(1)
    rng = np.random.default_rng(1)
    before = rng.bit_generator.state
    chosen = dsir_select(weights, 20, greedy=True, rng=rng, noise=np.arange(50.0))
    assert chosen.tolist() == np.argsort(-weights, kind="stable")[:20].tolist()
    assert rng.bit_generator.state == before


def test_no_texts():
    hashed = hash_ngrams([], num_buckets=5)
    assert bucket_distribution(hashed, 5).tolist() == [0] * 5
    assert log_importance_weights(hashed, np.ones(5), np.ones(5)).tolist() == []


def test_selection():
    weights = [1.0, 3.0, 2.0, np.nan]
    assert dsir_select(weights, 2, greedy=True).tolist() == [1, 2]
    assert dsir_select(weights, 2, noise=[5.0, 0.0, 0.0, 9.0]).tolist() == [0, 1]
    assert dsir_select(weights, 9, rng=np.random.default_rng(0)).tolist().count(3) == 0
    assert dsir_select(weights, 2, greedy=True, num_words=[99, 99, 100, 100], min_words=100).tolist() == [2]
    counts = np.bincount([dsir_select([0.0, np.log(3)], 1, rng=np.random.default_rng(s))[0] for s in range(800)])
    assert counts[1] / 800 == pytest.approx(0.75, abs=0.05)


def test_inverse_probability_weights():
    np.testing.assert_allclose(inverse_probability_weights([0.25] * 4), 1)
    np.testing.assert_allclose(inverse_probability_weights([0.5, 0.25, 0.25]), [0.6, 1.2, 1.2])
    weights = inverse_probability_weights([1.0, 0.0], clip=3.0)
    assert weights[1] / weights[0] == pytest.approx(6)
    assert weights.mean() == pytest.approx(1)


def test_errors_name_the_value():
    with pytest.raises(ValueError, match="0 and 2"):
        hash_ngrams([], num_buckets=0)
    with pytest.raises(ValueError, match="5 buckets, `target` has 4"):
        log_importance_weights(hash_ngrams([]), np.ones(5), np.ones(4))
    with pytest.raises(ValueError, match="min_words=5"):
        dsir_select([1.0], 1, greedy=True, min_words=5)
    with pytest.raises(ValueError, match="rng"):
        dsir_select([1.0], 1)
    with pytest.raises(ValueError, match="-1"):
        bucket_distribution(hash_ngrams([]), 5, smoothing=-1)
    with pytest.raises(ValueError, match="clip"):
        inverse_probability_weights([1.0], clip=0)
    with pytest.raises(ValueError, match=r"-0\.5"):
        inverse_probability_weights([-0.5, 1.5])
