"""Oracle adapter for DSIR."""

import re

import numpy as np

from dsel_trl.functional.text.dsir import (
    bucket_counts,
    bucket_distribution,
    dsir_select,
    hash_bucket,
    hash_ngrams,
    log_importance_weights,
    tokenize_words,
)


def features(hashed, buckets):
    return [bucket_counts(text, buckets) for text in np.split(hashed.buckets, hashed.offsets[1:-1])]


def evaluate(oracle):
    buckets = oracle["num_buckets"]
    raw = hash_ngrams(oracle["raw"], num_buckets=buckets)
    target = hash_ngrams(oracle["target"], num_buckets=buckets)
    got = {
        "tokenized_raw": [tokenize_words(text) for text in oracle["raw"]],
        "tokenized_target": [tokenize_words(text) for text in oracle["target"]],
        "hash_examples": {gram: hash_bucket(gram, buckets) for gram in oracle.get("hash_examples", {})},
        "features_raw": features(raw, buckets),
        "features_target": features(target, buckets),
        "length_metadata": raw.num_words,
    }
    for key, value in got.items():
        if key in oracle:
            yield key, value, oracle[key]
    for i, case in enumerate(oracle["results"]):
        log_weights = log_importance_weights(
            raw,
            bucket_distribution(raw, buckets),
            bucket_distribution(target, buckets, smoothing=case["target_laplace_smoothing"]),
        )
        yield f"results[{i}].log_importance_weights", log_weights, case["log_importance_weights"]
        noise = None
        for key in case:
            if match := re.fullmatch(r"gumbel_seed(\d+)", key):
                noise = case[key]
                drawn = np.random.RandomState(int(match[1])).gumbel(size=len(log_weights))
                yield f"results[{i}].{key}", drawn, noise
        for key, ids in case.items():
            if match := re.fullmatch(r"top(\d+)", key):
                selected = dsir_select(log_weights, int(match[1]), greedy=True)
            elif match := re.fullmatch(r"gumbel_top(\d+)", key):
                selected = dsir_select(log_weights, int(match[1]), noise=noise)
            else:
                continue
            yield f"results[{i}].{key}", np.sort(selected), ids
