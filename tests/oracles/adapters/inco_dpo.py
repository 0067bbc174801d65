"""Reads the InCo-DPO oracle."""

from dsel_trl.functional.inco_dpo import balanced_scores, choose_pair, prefix_length


def evaluate(oracle):
    inputs, expected = oracle["inputs"], oracle["expected"]
    rewards = [candidate["reward"] for candidate in inputs["candidates"]]
    mean_logps = [candidate["mean_logp"] for candidate in inputs["candidates"]]
    balanced = balanced_scores(rewards, mean_logps, inputs["consistency_weight"])
    pair, pair_balanced = choose_pair(rewards), choose_pair(rewards, balanced)
    got = {
        "prefix_lengths": [prefix_length(length, inputs["prefix_ratio"]) for length in inputs["off_policy_lengths"]],
        "chosen": pair and pair.chosen,
        "rejected": pair and pair.rejected,
        "balanced_scores": balanced,
        "chosen_balanced": pair_balanced and pair_balanced.chosen,
    }
    for name, value in expected.items():
        yield name, got[name], value
