"""Reads the RHO-LOSS oracle."""

import torch

from dsel_trl.functional.loss.rho_loss import median_irreducible, reducible_loss
from dsel_trl.functional.ranking import top_k


def evaluate(oracle):
    inputs, expected = oracle["inputs"], oracle["expected"]
    logits, targets = torch.tensor(inputs["logits"]), torch.tensor(inputs["targets"])
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    table = inputs["irreducible_loss_table"]
    reducible = reducible_loss(losses, [table[i] for i in inputs["global_index"]], median_irreducible(table))
    got = {
        "model_loss": losses,
        "reducible_loss": reducible,
        "selected_local_indices_best_first": top_k(reducible, inputs["k"]),
    }
    for name, value in expected.items():
        yield name, got[name], value
