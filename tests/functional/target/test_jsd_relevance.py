import numpy as np
import pytest

from dsel_trl.functional.target.jsd_relevance import jensen_shannon
from dsel_trl.functional.text.dsir import bucket_counts, bucket_distribution, hash_ngrams

BUCKETS = 50


def by_definition(p, q):
    middle = (p + q) / 2
    parts = [np.sum(d[d > 0] * np.log2(d[d > 0] / middle[d > 0])) for d in (p, q)]
    return sum(parts) / 2


def test_it_is_the_definition():
    hashed = hash_ngrams(["a b c", "a a a b", "", "z y x w v u", "b"], num_buckets=BUCKETS)
    target = bucket_distribution(hash_ngrams(["a b b c d", "e f"], num_buckets=BUCKETS), BUCKETS)
    expected = []
    for start, end in zip(hashed.offsets, hashed.offsets[1:], strict=False):
        counts = bucket_counts(hashed.buckets[start:end], BUCKETS)
        expected.append(by_definition(counts / counts.sum(), target) if end > start else np.nan)
    np.testing.assert_allclose(jensen_shannon(hashed, target), expected, atol=1e-12)


def test_equal_words_and_none_in_common():
    hashed = hash_ngrams(["a b", "c d"], num_buckets=10_000)
    target = bucket_distribution(hash_ngrams(["a b a b"], num_buckets=10_000, ngrams=1), 10_000)
    words = hash_ngrams(["a b", "c d"], num_buckets=10_000, ngrams=1)
    np.testing.assert_allclose(jensen_shannon(words, target), [0.0, 1.0], atol=1e-12)
    assert jensen_shannon(hashed, target)[1] == 1.0
    with pytest.raises(ValueError, match="sums to 2"):
        jensen_shannon(words, 2 * target)
