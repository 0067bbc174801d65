"""Reads the SelectiveDPO oracle."""

from dsel_trl.functional.preference.selective_dpo import (
    easiest_rows,
    easy_first,
    half_split,
    learned_step,
    mean_validation_loss,
)


def evaluate(oracle):
    inputs, expected = oracle["inputs"], oracle["expected"]
    tables = {}
    for name, rows in inputs["validation_losses"].items():
        tables.setdefault(name.rsplit("-", 1)[0], []).extend(rows)
    difficulty = mean_validation_loss(tables.values(), join="left")
    row_ids = inputs["train_prompt_ids"]
    selected = easiest_rows(row_ids, difficulty, inputs["keep_fraction"])
    got = {
        "learning_order": difficulty,
        "column_order_of_ids": list(difficulty),
        "sorted_train_rows": easy_first(row_ids, difficulty),
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
