"""Reads the alpha-DPO oracle: consecutive batches with moving averages that start at zero."""

import torch

from dsel_trl.functional.margins import log_ratio_margin
from dsel_trl.functional.preference.alpha_dpo import alpha_dpo_loss, alpha_margin
from dsel_trl.functional.running import EmaMoments, ema_update


def evaluate(oracle):
    inputs, expected = oracle["inputs"], oracle["expected"]
    state, batches = EmaMoments(), []
    for batch, wanted in zip(inputs["batches"], expected["batches"], strict=True):
        names = ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected")
        logps = [torch.tensor(batch[name]) for name in names]
        ratio_margin = log_ratio_margin(*logps)
        state = ema_update(state, ratio_margin, inputs["ema_gamma"], init="zero")
        margin = alpha_margin(ratio_margin, state.mean, state.std, inputs["alpha"], inputs["gamma_beta_ratio"])
        got = {
            "ema_mean": [state.mean],
            "ema_std": [state.std],
            "margin_term": margin,
            "losses": alpha_dpo_loss(*logps[:2], margin, inputs["beta"]),
        }
        batches.append({name: got[name] for name in wanted})
    for name, value in expected.items():
        yield name, {"batches": batches}[name], value
