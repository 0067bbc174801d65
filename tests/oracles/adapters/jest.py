"""Oracle adapter for JEST and temperature sampling."""

import re

import numpy as np

from dsel_trl.functional.loss.jest import chunk_size, conditional_logits, learnability
from dsel_trl.functional.ranking import gumbel_top_k, rank_order, softmax_weights
from tests.oracles.ties import first_of_equals


def evaluate(oracle):
    learner, reference = np.asarray(oracle["learner_loss"]), np.asarray(oracle["ref_loss"])
    scores = learnability(learner, reference)
    if "learnability" in oracle:
        yield "learnability", scores, oracle["learnability"]
    ranked_by = {"hard_learner_order": learner, "easy_reference_order": -reference, "learnability_order": scores}
    for key, values in ranked_by.items():
        if key in oracle:
            order, expected = (first_of_equals(ids, values).tolist() for ids in (rank_order(values), oracle[key]))
            yield key, order, expected
    for i, case in enumerate(oracle.get("temperature_cases", [])):
        temperature = case["temperature"]
        if "probabilities" in case:
            yield f"temperature_cases[{i}].probabilities", softmax_weights(scores, temperature), case["probabilities"]
        for key in case:
            if match := re.fullmatch(r"gumbel_top(\d+)", key):
                ids = gumbel_top_k(scores, int(match[1]), temperature, noise=case["gumbel"])
                yield f"temperature_cases[{i}].{key}", ids, case[key]
    for i, step in enumerate(oracle.get("joint_steps", [])):
        logits = conditional_logits(oracle["score_matrix"], step["already_selected"])
        yield f"joint_steps[{i}]", logits, step["conditional_logits"]
    if "chunk_arithmetic" in oracle:
        case = oracle["chunk_arithmetic"]
        size = chunk_size(case["super_batch"] * (1 - case["filter_ratio"]), case["n_chunks"], cover=False)
        yield "draws_per_chunk", size, case["draws_per_chunk_int_floor"]
        if "batch" in case:
            yield "batch", size * case["n_chunks"], case["batch"]
