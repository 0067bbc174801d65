"""Reads the InCo-DPO oracle."""

from dsel_trl.functional.preference.inco_dpo import balanced_scores, choose_pair, prefix_length
from dsel_trl.functional.ranking import top_k


def evaluate(oracle):
    inputs, expected = oracle["inputs"], oracle["expected"]
    rewards = [candidate["reward"] for candidate in inputs["candidates"]]
    mean_logps = [candidate["mean_logp"] for candidate in inputs["candidates"]]
    balanced = balanced_scores(rewards, mean_logps, inputs["consistency_weight"])
    pair = choose_pair(rewards)
    got = {
        "prefix_lengths": [prefix_length(length, inputs["prefix_ratio"]) for length in inputs["off_policy_lengths"]],
        "chosen": pair and pair.chosen,
        "rejected": pair and pair.rejected,
        "balanced_scores": balanced,
        # The best candidate by this score, also where it has the lowest reward and gives no pair.
        "chosen_balanced": pair and int(top_k(balanced, 1)[0]),
    }
    for name, value in expected.items():
        yield name, got[name], value
