"""Reads the LESS oracle: Adam features, normalised projections, influences and their ranking."""

import torch

from dsel_trl.functional.influence.less import (
    adam_update,
    by_subtask,
    influence,
    less_scores,
    over_checkpoints,
    rate_weights,
    unit,
)
from dsel_trl.functional.ranking import rank_order


def evaluate(oracle):
    for index, case in enumerate(oracle["cases"]):
        inputs, expected = case["inputs"], case["expected"]
        read = lambda values: torch.tensor(values, dtype=torch.float64)  # noqa: E731
        projection, rates = read(inputs["projection"]), inputs["checkpoint_lrs"]
        updates, trains, targets, found = [], [], [], []
        for checkpoint in inputs["checkpoints"]:
            train, target = read(checkpoint["sgd_train_grads"]), read(checkpoint["val_grads"])
            updates.append(adam_update(train, read(checkpoint["avg"]), read(checkpoint["avg_sq"])))
            trains.append(unit(updates[-1] @ projection))
            targets.append(unit(target @ projection))
            found.append(influence(trains[-1], targets[-1]))
        matrix = over_checkpoints(found, rates)
        shots = matrix.shape[1] // inputs["n_subtasks"]
        scores = less_scores(by_subtask(matrix, torch.arange(matrix.shape[1]) // shots))
        got = {
            "adam_train_grads": torch.stack(updates),
            "normalised_projected_train": torch.stack(trains),
            "normalised_projected_val": torch.stack(targets),
            "normalised_checkpoint_weights": rate_weights(rates),
            "influence_matrix": matrix,
            "score": scores,
            "ranking_desc": rank_order(scores.numpy()),
        }
        for name, value in expected.items():
            yield f"case {index}: {name}", got[name], value
