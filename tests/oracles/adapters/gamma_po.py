"""Reads the gamma-PO oracle."""

import torch

from dsel_trl.functional.preference.gamma_po import gamma_po_loss, target_margins


def evaluate(oracle):
    inputs, expected = oracle["inputs"], oracle["expected"]
    gaps = torch.tensor(inputs["reward_gaps"])
    options = {name: inputs[name] for name in ("gamma0", "tau", "iterations", "eps") if name in inputs}
    margins = target_margins(gaps, **options)
    past = torch.tensor(inputs.get("queue", []), dtype=gaps.dtype)
    got = {
        "gamma": margins,
        "gamma_sum": margins.sum(),
        "gamma_with_queue": target_margins(gaps, past_gaps=past, **options),
        "loss_simpo": gamma_po_loss(gaps, margins),
    }
    for name, value in expected.items():
        yield name, got[name], value
