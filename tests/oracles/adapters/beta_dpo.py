"""Reads the beta-DPO oracle: consecutive batches with moving averages that start at zero and the mask of the file."""

import torch

from dsel_trl.functional.margins import dpo_loss, log_ratio_margin
from dsel_trl.functional.preference.beta_dpo import batch_beta, kept_mean_weights, kept_pairs, log_keep_weights
from dsel_trl.functional.running import EmaMoments, ema_update


def evaluate(oracle):
    inputs, expected = oracle["inputs"], oracle["expected"]
    state, steps = EmaMoments(), []
    for batch, wanted in zip(inputs["batches"], expected["steps"], strict=True):
        margin = log_ratio_margin(
            torch.tensor(batch["policy_chosen"]),
            torch.tensor(batch["policy_rejected"]),
            torch.tensor(batch.get("reference_chosen", inputs.get("reference_chosen"))),
            torch.tensor(batch.get("reference_rejected", inputs.get("reference_rejected"))),
        )
        mask = torch.tensor(batch.get("mask", wanted["mask"]))
        state = ema_update(state, margin, inputs["ema_gamma"], init="zero")
        beta_used = batch_beta(margin, mask, state.mean, state.std, inputs["beta"], inputs["a"])
        losses = dpo_loss(beta_used * margin)
        got = {
            "gap": margin,
            "ema_mean": state.mean,
            "ema_std": state.std,
            "weights": log_keep_weights(margin, state.mean, state.std).exp(),
            "mask": mask,
            "n_kept": kept_pairs(len(margin), inputs["filter_ratio"]),
            "beta_used": beta_used,
            "losses": losses,
            "loss": (kept_mean_weights(mask) * losses).mean(),
        }
        steps.append({name: got[name] for name in wanted})
    for name, value in expected.items():
        yield name, {"steps": steps}[name], value
