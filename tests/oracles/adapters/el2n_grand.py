"""Reads the EL2N and GraNd oracle: distances of tokens from their labels, and the norm of the head's gradient."""

import torch

from dsel_trl.functional.ghost import Outer, square_norms
from dsel_trl.functional.influence.el2n import token_el2n, token_mean
from dsel_trl.functional.preference.wpo import log_sum_squared_probs, target_logps


def evaluate(oracle):
    for index, case in enumerate(oracle["cases"]):
        inputs, expected = case["inputs"], case["expected"]
        logits, hidden = (torch.tensor(inputs[name], dtype=torch.float64) for name in ("logits", "hidden"))
        labels = torch.tensor(inputs["labels"])
        mask = labels != -100
        logps = target_logps(logits, labels.clamp(min=0))
        tokens = token_el2n(logps, log_sum_squared_probs(logits))
        # What comes back to the head's output: the gradient of the mean loss of the label tokens.
        logits.requires_grad_()
        torch.nn.functional.cross_entropy(logits, labels).backward()
        got = {
            "el2n_mean": token_mean(tokens[None], mask[None])[0],
            "el2n_per_token": tokens[mask],
            "grand_head_only": square_norms(Outer(hidden[None], logits.grad[None]))[0].sqrt(),
            "nll": token_mean(-logps[None], mask[None])[0],
        }
        for name, value in expected.items():
            if name != "grand_head_formula":
                yield f"case {index}: {name}", got[name], value
