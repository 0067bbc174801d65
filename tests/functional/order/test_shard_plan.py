import numpy as np
import pytest

from dsel_trl.functional.order.shard_plan import plan_shards

TWO_BUCKETS = {
    "num_shards": [10, 10],
    "sequences_per_shard": [8, 4],
    "sequence_lengths": [4, 8],
    "batch_multipliers": [2, 1],
    "odds": [2, 1],
}


def test_exact_plan_by_hand():
    # A shard of either bucket has 32 tokens: 256 tokens in 2 cycles are 2 shards of each bucket per cycle.
    plan = plan_shards(256, 2, **TWO_BUCKETS)
    assert plan.sequences.tolist() == [16, 8]
    assert plan.tokens_per_cycle == 128
    assert plan.weights.tolist() == [4.0, 2.0]
    assert plan.exact


def test_units_are_whole_shards_on_every_process():
    plan = plan_shards(10_000, 3, num_processes=2, num_workers=2, global_batch=2, **TWO_BUCKETS)
    assert (plan.sequences % np.array([32, 16]) == 0).all()
    assert not plan.exact
    assert plan.total_tokens == 3 * plan.tokens_per_cycle
    assert abs(plan.total_tokens - 10_000) <= 3 * 128


def test_an_empty_first_bucket_has_weight_zero():
    plan = plan_shards(64, 1, **{**TWO_BUCKETS, "num_shards": [0, 10]})
    assert plan.sequences.tolist() == [0, 8]
    assert plan.weights.tolist() == [0.0, 2.0]


def test_errors_name_the_value():
    with pytest.raises(ValueError, match="bucket 0: one shard per process holds 8"):
        plan_shards(256, 2, global_batch=4, **TWO_BUCKETS)
    with pytest.raises(ValueError, match="one entry per bucket"):
        plan_shards(256, 2, **{**TWO_BUCKETS, "odds": [1]})
    with pytest.raises(ValueError, match="positive"):
        plan_shards(0, 2, **TWO_BUCKETS)
