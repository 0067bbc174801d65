"""Data Shapley in a run: the worth of examples from a target, or from a table of `dsel value`."""

import numpy as np
import pytest
from datasets import Dataset

from dsel_trl import SelectionCallback, create_method
from dsel_trl.data.value_table import write_values


def pairs(size, seed, flipped=0):
    """Longer answers that use the prompt's words are chosen; the first `flipped` rows are the wrong way round."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(size):
        words = [f"w{n}" for n in rng.permutation(12)]
        answers = [" " + " ".join(words[:5]), " " + " ".join(words[6:9])]
        if i < flipped:
            answers.reverse()
        rows.append({"prompt": " ".join(words[:5]), "chosen": answers[0], "rejected": answers[1], "source": i // 6})
    return Dataset.from_list(rows)


def trained(make_trainer, dataset, **parameters):
    trainer = make_trainer("dpo", dataset=dataset, max_steps=1)
    callback = SelectionCallback(trainer, "data_shapley", **parameters)
    trainer.add_callback(callback)
    trainer.train()
    return callback


def dropped(callback):
    return np.flatnonzero(callback.ledger.dropped).tolist()


@pytest.mark.parametrize("grouped", [{}, {"group_column": "source"}])
def test_wrong_labels_are_left_out(make_trainer, grouped):
    given = {"target": pairs(12, 2), "keep": 0.75, "permutations": 40, "features": 4, **grouped}
    callback = trained(make_trainer, pairs(24, 1, flipped=6), **given)
    assert dropped(callback) == [0, 1, 2, 3, 4, 5]
    values = callback.ledger["data_shapley"]
    assert values[:6].max() < 0 < values[6:].min()
    if grouped:
        assert all(np.ptp(values[start : start + 6]) == 0 for start in range(0, 24, 6))


def test_a_table_decides_by_the_rows_of_the_file(make_trainer, tmp_path):
    path = tmp_path / "values.parquet"
    write_values(path, np.where(np.arange(24) % 3 == 0, -1.0, np.arange(24) / 24))
    callback = trained(make_trainer, pairs(24, 1), values=str(path), keep=2 / 3)
    assert dropped(callback) == list(range(0, 24, 3))


def test_a_table_of_another_dataset(make_trainer, tmp_path):
    path = tmp_path / "values.parquet"
    write_values(path, np.arange(10.0))
    with pytest.raises(ValueError, match="holds 10 values"):
        trained(make_trainer, pairs(24, 1), values=str(path))


def test_a_column_that_is_not_there(make_trainer):
    with pytest.raises(ValueError, match="group_column='origin'"):
        trained(make_trainer, pairs(24, 1), target=pairs(4, 2), group_column="origin")


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"target": "demo", "values": "values.parquet"},
        {"values": "values.parquet", "group_column": "source"},
        {"target": "demo", "ridge": 0.0},
        {"target": "demo", "features": 0},
        {"target": "demo", "permutations": 0},
    ],
)
def test_wrong_parameters(parameters):
    with pytest.raises(ValueError, match="|".join(parameters) or "target"):
        create_method("data_shapley", **parameters)
