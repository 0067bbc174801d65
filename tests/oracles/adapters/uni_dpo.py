"""Reads the Uni-DPO oracle."""

import torch

from dsel_trl.functional.preference.uni_dpo import (
    likelihood_indicator,
    performance_weight,
    quality_weight,
    uni_dpo_loss,
)


def evaluate(oracle):
    inputs, expected = oracle["inputs"], oracle["expected"]
    policy = [torch.tensor(inputs[name]) for name in ("policy_chosen", "policy_rejected")]
    reference = [torch.tensor(inputs[name]) for name in ("ref_chosen", "ref_rejected")]
    scores = [torch.tensor(inputs[name]) for name in ("score_chosen", "score_rejected")]
    options = {
        name: inputs[name] for name in ("beta", "eta", "tau_ref", "gamma", "nll_lambda", "tau_good") if name in inputs
    }
    got = {
        "losses": uni_dpo_loss(*policy, *reference, *scores, **options),
        "w_qual": quality_weight(*scores, eta=inputs["eta"]),
        "w_perf": performance_weight(*policy, inputs["beta"], inputs["tau_ref"], inputs["gamma"]),
        "nll_indicator": likelihood_indicator(policy[0], reference[0], scores[0], inputs["tau_good"]),
    }
    for name, value in expected.items():
        yield name, got[name], value
