"""Reads the AMaPO oracle; the reference puts no limit on the exponent."""

import torch

from dsel_trl.functional.preference.amapo import amapo_loss, amapo_margin
from dsel_trl.functional.running import batch_moments


def evaluate(oracle):
    inputs, expected = oracle["inputs"], oracle["expected"]
    gap = torch.tensor(inputs["policy_chosen"]) - torch.tensor(inputs["policy_rejected"])
    margin = amapo_margin(gap, inputs["beta"], max_exponent=None)
    mean, std = batch_moments(gap)
    got = {
        "losses": amapo_loss(gap, margin, inputs["beta"]),
        "instance_margin": margin,
        "batch_margin_mean": mean,
        "batch_margin_std": std,
    }
    for name, value in expected.items():
        yield name, got[name], value
