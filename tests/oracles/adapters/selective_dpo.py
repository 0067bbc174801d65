"""Reads the SelectiveDPO oracle."""

import numpy as np

from dsel_trl.bases.scored import in_order
from dsel_trl.functional.preference.selective_dpo import half_split, learned_step, mean_validation_loss, values_by_id
from dsel_trl.functional.ranking import keep_count


def evaluate(oracle):
    inputs, expected = oracle["inputs"], oracle["expected"]
    tables = {}
    for name, rows in inputs["validation_losses"].items():
        tables.setdefault(name.rsplit("-", 1)[0], []).extend(rows)
    # As in the reference, the first table says which examples there are.
    known = list(dict.fromkeys(key for key, _ in next(iter(tables.values()))))
    losses = [values_by_id(known, [key for key, _ in table], [loss for _, loss in table]) for table in tables.values()]
    mean = mean_validation_loss(losses)
    difficulty = dict(zip(known, mean.tolist(), strict=True))
    row_ids = inputs["train_prompt_ids"]
    rows = np.flatnonzero([key in difficulty for key in row_ids])
    order = in_order(-values_by_id(row_ids, known, mean), rows)
    selected = order[: keep_count(inputs["keep_fraction"], len(order))]
    got = {
        "learning_order": difficulty,
        "column_order_of_ids": list(difficulty),
        "sorted_train_rows": order,
        "selected_rows_in_training_order": selected,
        "selected_prompt_ids": [row_ids[row] for row in selected],
        "n_selected": len(selected),
    }
    if "half_splits" in expected:
        got["half_splits"] = {}
        for seed in inputs["split_seeds"]:
            split = half_split(len(inputs["prompt_ids"]), int(seed))._asdict()
            got["half_splits"][str(seed)] = {"perm": split.pop("permutation"), **split}
    if "learned_step" in expected:
        got["learned_step"] = learned_step(inputs["learned_step"]["margins"], inputs["learned_step"]["delta"])
    for name, value in expected.items():
        yield name, got[name], value
