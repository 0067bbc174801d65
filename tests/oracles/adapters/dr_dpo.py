"""Reads the Dr. DPO oracle."""

import torch

from dsel_trl.functional.margins import dpo_loss
from dsel_trl.functional.preference.dr_dpo import dr_dpo_aggregate, dr_dpo_weights


def evaluate(oracle):
    inputs, expected = oracle["inputs"], oracle["expected"]
    losses = dpo_loss(inputs["beta"] * torch.tensor(inputs["margins"], dtype=torch.float64))
    large = torch.tensor(inputs.get("all_large_losses", []), dtype=torch.float64)
    temperature = inputs["beta_prime"]
    got = {
        "losses": losses,
        "aggregate": dr_dpo_aggregate(losses, temperature),
        "gradient_weights": dr_dpo_weights(losses, temperature, normalize="sum1"),
        "aggregate_all_large": dr_dpo_aggregate(large, temperature),
        "reference_aggregate_all_large": dr_dpo_aggregate(large, temperature, literal=True),
    }
    for name, value in expected.items():
        yield name, got[name], value
