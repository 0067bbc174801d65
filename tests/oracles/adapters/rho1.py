"""Oracle adapter for Rho-1."""

import torch

from dsel_trl.functional.loss.rho1 import excess_loss, select_tokens, selected_token_weights


def evaluate(oracle):
    for i, case in enumerate(oracle["cases"]):
        loss = torch.tensor(case["loss"], dtype=torch.float64)
        ref_loss = torch.tensor(case["ref_loss"], dtype=torch.float64)
        mask = torch.tensor(case["mask"]).bool()
        excess = excess_loss(loss, ref_loss)
        selected = select_tokens(excess, mask, case["select_ratio"], case["scope"])
        weights = selected_token_weights(selected)
        got = {
            "excess_loss": excess,
            "selected": selected.int(),
            "n_selected": int(selected.sum()),
            "slm_loss": float((weights * loss)[selected].sum()),
            "grad_weight_per_token": weights,
        }
        for key, value in got.items():
            if key in case:
                yield f"cases[{i}].{key}", value, case[key]
