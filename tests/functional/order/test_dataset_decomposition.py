import numpy as np
import pytest

from dsel_trl.functional.order.dataset_decomposition import (
    bucket_batch_size,
    bucket_of_length,
    decompose,
    decomposition_plan,
    split_probabilities,
)
from dsel_trl.functional.order.length_curriculum import cycle_counts


def plain_pieces(length, low, high):
    start, pieces = 0, []
    while length - start > 1 and (k := (length - start - 1).bit_length() - 1) >= low:
        k = min(k, high)
        pieces.append((start, k))
        start += 2**k + 1
    return pieces, length - start


def test_equals_the_plain_loop_for_every_length():
    lengths = np.arange(400)
    pieces = decompose(lengths, min_log2=2, max_log2=5)
    for length in lengths:
        mine = pieces.document == length
        got = list(zip(pieces.start[mine].tolist(), pieces.bucket[mine].tolist(), strict=True))
        assert (got, pieces.dropped_tail[length]) == plain_pieces(int(length), 2, 5)
        assert (np.diff(pieces.bucket[mine]) <= 0).all()
        assert (np.diff(pieces.bucket[mine & (pieces.bucket < 5)]) < 0).all()


@pytest.mark.parametrize("rng", [None, np.random.default_rng(0)])
def test_no_token_is_lost_or_doubled(rng):
    lengths = np.random.default_rng(1).integers(0, 5000, size=200)
    pieces = decompose(lengths, min_log2=3, max_log2=7, rng=rng)
    sizes = 2**pieces.bucket + 1
    used = np.bincount(pieces.document, weights=sizes, minlength=200)
    np.testing.assert_array_equal(used + pieces.dropped_tail, lengths)
    assert (pieces.dropped_tail < 2**3 + 1).all()
    same = pieces.document[1:] == pieces.document[:-1]
    np.testing.assert_array_equal((pieces.start + sizes)[:-1][same], pieces.start[1:][same])


def test_random_split_spreads_tokens_evenly():
    np.testing.assert_allclose(split_probabilities(2, 4), [1 / 7, 2 / 7, 4 / 7])
    pieces = decompose([400_000], min_log2=3, max_log2=6, rng=np.random.default_rng(0))
    tokens = np.bincount(pieces.bucket, weights=2.0**pieces.bucket)[3:]
    np.testing.assert_allclose(tokens / tokens.sum(), 0.25, atol=0.02)


def test_buckets_of_examples():
    assert bucket_of_length([3, 5, 9, 12, 17], min_log2=2, max_log2=4).tolist() == [2, 3, 4, 4, 4]
    lengths = np.arange(1, 5000)
    expected = [(int(n) - 1).bit_length() for n in lengths]
    assert bucket_of_length(lengths, min_log2=0, max_log2=13).tolist() == expected
    assert bucket_of_length([0, 1, 2**13 + 1]).tolist() == [8, 8, 13]


def test_batch_sizes():
    assert bucket_batch_size([2, 3, 4], 64).tolist() == [16, 8, 4]
    assert bucket_batch_size([2, 3, 4], 64, rows_per_example=2).tolist() == [8, 4, 2]
    assert bucket_batch_size(9, 64).tolist() == 1


@pytest.mark.parametrize("construction", ["odds", "subcycle"])
@pytest.mark.parametrize("cycles", [1, 3])
def test_plan_has_every_example_once(construction, cycles):
    buckets = bucket_of_length(np.random.default_rng(0).integers(1, 300, size=500), min_log2=4, max_log2=8)
    plan = decomposition_plan(buckets, 512, seed=0, cycles=cycles, construction=construction)
    assert sorted(np.concatenate([batch.ids for batch in plan]).tolist()) == list(range(500))
    for batch in plan:
        assert (buckets[batch.ids] == batch.bucket).all()
        assert 0 < len(batch.ids) <= 512 // 2**batch.bucket
    assert [batch.cycle for batch in plan] == sorted(batch.cycle for batch in plan)
    full = decomposition_plan(buckets, 512, seed=0, cycles=cycles, construction=construction, drop_last=True)
    assert all(len(batch.ids) * 2**batch.bucket == 512 for batch in full)


@pytest.mark.parametrize("construction", ["odds", "subcycle"])
@pytest.mark.parametrize("drop_last", [False, True])
def test_each_cycle_uses_its_share_of_every_bucket(construction, drop_last):
    buckets = bucket_of_length(np.random.default_rng(1).integers(1, 300, size=700), min_log2=4, max_log2=8)
    plan = decomposition_plan(buckets, 512, seed=3, cycles=3, construction=construction, drop_last=drop_last)
    kinds, counts = np.unique(buckets, return_counts=True)
    sizes = 512 // 2**kinds
    num_batches = counts // sizes if drop_last else -(-counts // sizes)
    used = np.zeros((3, len(kinds)), dtype=int)
    np.add.at(used, ([batch.cycle for batch in plan], np.searchsorted(kinds, [batch.bucket for batch in plan])), 1)
    assert used.tolist() == cycle_counts(num_batches, 3).tolist()


def test_plan_is_reproducible():
    buckets = bucket_of_length(np.arange(1, 300), min_log2=4, max_log2=8)
    first, second, other = (decomposition_plan(buckets, 512, seed=seed) for seed in (1, 1, 2))
    assert all((a.ids == b.ids).all() for a, b in zip(first, second, strict=True))
    assert any(a.ids.tolist() != b.ids.tolist() for a, b in zip(first, other, strict=True))


def test_errors_name_the_value():
    with pytest.raises(ValueError, match="5 and 3"):
        decompose([1], min_log2=5, max_log2=3)
    with pytest.raises(ValueError, match="non-negative"):
        decompose([-1])
    with pytest.raises(ValueError, match="0 and 1"):
        bucket_batch_size(3, 0)
    with pytest.raises(ValueError, match="random"):
        decomposition_plan([3], 8, seed=0, construction="random")
