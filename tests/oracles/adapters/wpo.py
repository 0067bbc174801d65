"""Reads the WPO oracle."""

import torch

from dsel_trl.functional.margins import dpo_loss, implicit_margin
from dsel_trl.functional.preference.wpo import aligned_logps, log_sum_squared_probs, token_logps, wpo_pair_weight


def evaluate(oracle):
    inputs, expected = oracle["inputs"], oracle["expected"]
    logits, labels = torch.tensor(inputs["logits"]), torch.tensor(inputs["labels"])
    logps, mask = token_logps(logits, labels)
    aligned = aligned_logps(logps, log_sum_squared_probs(logits[:, :-1]), mask)
    weight = wpo_pair_weight(*aligned.chunk(2))
    margin = implicit_margin(
        *logps.sum(-1).chunk(2), *torch.tensor(inputs["reference_logps"]).chunk(2), beta=inputs["beta"]
    )
    losses = weight * dpo_loss(margin)
    got = {
        "sequence_logps": logps.sum(-1),
        "mean_aligned_logp": aligned,
        "uncapped_pair_weight": wpo_pair_weight(*aligned.chunk(2), cap=None),
        "pair_weight": weight,
        "trl_pair_weight": wpo_pair_weight(*aligned.chunk(2), cap=None),
        "losses": losses,
        "loss": losses.mean(),
    }
    for name, value in expected.items():
        yield name, got[name], value
