"""Reads the robust-DPO oracle."""

import torch

from dsel_trl.functional.preference.robust_dpo import (
    clean_posterior,
    conservative_gradient,
    conservative_loss,
    robust_gradient,
    robust_loss,
)


def evaluate(oracle):
    inputs, expected = oracle["inputs"], oracle["expected"]
    margin = inputs["beta"] * torch.tensor(inputs["margins"], dtype=torch.float64)
    functions = {
        "robust_losses": robust_loss,
        "conservative_losses": conservative_loss,
        "robust_grad": robust_gradient,
        "conservative_grad": conservative_gradient,
        "clean_posterior": clean_posterior,
    }
    for name, value in expected.items():
        yield name, functions[name](margin, inputs["label_smoothing"]), value
