"""Oracle adapter for dataset decomposition."""

import random

import numpy as np

from dsel_trl.commands.shards import ShardArguments, shard_lines
from dsel_trl.functional.order.dataset_decomposition import bucket_batch_size, decompose, split_probabilities
from dsel_trl.functional.order.length_curriculum import (
    bucket_probabilities,
    curriculum_odds,
    cycle_counts,
    schedule_by_odds,
    subcycle_counts,
    subcycle_odds,
)


def evaluate(oracle):
    case = oracle.get("decompose")
    if case:
        yield from evaluate_decompose(case)
        randomized = oracle.get("decompose_randomized", {})
        limits = {key: randomized.get(key, case[key]) for key in ("min_log2", "max_log2")}
        yield from evaluate_randomized(randomized, limits)
    if "schedule" in oracle:
        yield from evaluate_schedule(oracle["schedule"])
    for i, case in enumerate(oracle.get("olmo_core_counts", [])):
        odds = subcycle_odds(case["curriculum"], case["num_buckets"])
        batches = np.broadcast_to(case["batches_in_bucket_per_cycle"], case["num_buckets"])
        yield f"olmo[{i}].odds", odds, case["odds_by_bucket_then_subcycle"]
        counts = subcycle_counts(batches, odds, clip_surplus=False)
        yield f"olmo[{i}].counts", counts, case["batch_counts_by_bucket_then_subcycle"]
    if "get_dd_params" in oracle:
        yield from evaluate_planner(oracle["get_dd_params"])


def evaluate_decompose(case):
    lengths = [document["doc_len_incl_eos"] for document in case["documents"]]
    pieces = decompose(lengths, min_log2=case["min_log2"], max_log2=case["max_log2"])
    for i, document in enumerate(case["documents"]):
        got = [
            {"start": start, "bucket_log2": bucket, "n_tokens": 2**bucket + 1, "train_seq_len": 2**bucket}
            for start, bucket in zip(
                pieces.start[pieces.document == i].tolist(), pieces.bucket[pieces.document == i].tolist(), strict=True
            )
        ]
        yield f"documents[{i}].pieces", got, document["pieces"]
        yield f"documents[{i}].dropped_tail_tokens", pieces.dropped_tail[i], document["dropped_tail_tokens"]
    if "bucket_counts" in case:
        buckets, counts = np.unique(pieces.bucket, return_counts=True)
        got = dict.fromkeys(case["bucket_counts"], 0) | dict(zip(map(str, buckets), counts.tolist(), strict=True))
        yield "bucket_counts", got, case["bucket_counts"]


def evaluate_randomized(randomized, limits):
    if "p_over_k_descending_from_max" in randomized:
        yield "split_probabilities", split_probabilities(**limits), randomized["p_over_k_descending_from_max"]
    for i, case in enumerate(randomized.get("cases", [])):
        rng = np.random.RandomState(case["np_random_seed"])
        pieces = decompose([case["doc_len_incl_eos"]], rng=rng, **limits)
        expected = case["pieces_in_order"]
        yield f"randomized[{i}].start", pieces.start, [piece["start"] for piece in expected]
        yield f"randomized[{i}].bucket", pieces.bucket, [piece["bucket_log2"] for piece in expected]


def evaluate_schedule(schedule):
    lengths = np.asarray(schedule["seq_lens"])
    sizes = bucket_batch_size(np.log2(lengths).astype(int), schedule["tokens_per_batch"])
    yield "batch_sizes", sizes, schedule["batch_sizes_in_sequences"]
    for i, case in enumerate(schedule["cases"]):
        odds = curriculum_odds(case["curriculum"], len(lengths))
        yield f"schedule[{i}].odds", odds, case["odds_short_to_long"]
        # The published loader drops batches that do not divide into the cycles; the file shows it by their number.
        served = sum(map(len, case["steps_per_cycle"]))
        available = schedule["batches_available"]
        counts = cycle_counts(available, case["num_cycles"], drop_remainder=served < sum(available))
        yield f"schedule[{i}].weights", counts[0] * odds, case["weights_per_cycle"]
        yield f"schedule[{i}].probabilities", bucket_probabilities(counts[0], odds), case["first_step_probs"]
        for cycle, expected in enumerate(case["steps_per_cycle"]):
            steps = schedule_by_odds(counts[cycle], odds, random.Random(42 + cycle))
            yield f"schedule[{i}].cycle {cycle}", np.stack([lengths[steps], sizes[steps]], axis=1), expected


def evaluate_planner(case):
    yield "get_dd_params", shard_lines(ShardArguments(**case["args"])), case["printed"]
