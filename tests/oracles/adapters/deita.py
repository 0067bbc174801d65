"""Oracle adapter for DEITA."""

import warnings

import numpy as np
import torch

from dsel_trl.functional.kmeans import unit_rows
from dsel_trl.functional.ranking import rank_order
from dsel_trl.functional.text.deita import (
    LLAMA_DIGIT_IDS,
    MISTRAL_DIGIT_IDS,
    conversation_scores,
    digit_logits,
    diversity_filter,
    expected_digit,
)

DIGIT_IDS = {"llama": LLAMA_DIGIT_IDS, "mistral": MISTRAL_DIGIT_IDS}


def evaluate(oracle):
    for i, case in enumerate(oracle.get("scorer_expected_value", [])):
        yield f"scorer[{i}]", expected_digit(case["logits_for_tokens_1_to_6"]), case["expected_score"]
    for i, case in enumerate(oracle.get("scorer_vllm", [])):
        logprobs = {int(token): value for token, value in case["logprobs_by_token_id"].items()}
        # The file does not name the tokenizer: it is the one whose digits occur.
        ids = max(DIGIT_IDS.values(), key=lambda digits: len(set(digits) & set(logprobs)))
        # Only the likeliest tokens are listed: of the others nothing is known.
        values = torch.full((max(*logprobs, *ids) + 1,), torch.nan, dtype=torch.float64)
        values[list(logprobs)] = torch.tensor(list(logprobs.values()), dtype=torch.float64)
        yield f"scorer_vllm[{i}]", expected_digit(digit_logits(values, ids)), case["expected_score"]
    for name, digits in oracle.get("token_ids", {}).items():
        got = {str(token): str(digit) for digit, token in enumerate(DIGIT_IDS[name], start=1)}
        yield f"token_ids.{name}", got, digits
    if "filter" in oracle:
        yield from evaluate_filter(oracle["filter"])


def evaluate_filter(case):
    scores = conversation_scores(
        [row["complexity_scores"] for row in case["rows"]], [row["quality_scores"] for row in case["rows"]]
    )
    yield "final_scores", scores, case["final_scores"]
    yield "sorted_order", rank_order(scores), case["sorted_order"]
    embeddings = np.asarray(case["embeddings"], dtype=np.float32)
    if "cosine_similarity" in case:
        unit = unit_rows(embeddings)
        yield "cosine_similarity", unit @ unit.T, case["cosine_similarity"]
    for i, entry in enumerate(case["cases"]):
        config = entry["config"]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*are zero: they count as similar to nothing")
            got = diversity_filter(
                scores,
                embeddings,
                threshold=config["threshold"],
                size=config["data_size"],
                # The files hold what the published code does, whose groups are of one unless they say otherwise.
                batch_size=config.get("batch_size", 1),
                # Tiling changes no result; small tiles show it.
                block_size=config.get("chunk_size", 1024),
            )
        yield f"cases[{i}]", got, entry["selected_indices_in_order"]
