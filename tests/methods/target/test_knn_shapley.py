"""KNN-Shapley in a run: wrong labels have the lowest values."""

import numpy as np
import pytest
from datasets import Dataset

from dsel_trl import SelectionCallback, create_method


def rows(size, seed, flipped=0):
    """Vectors of two kinds, with a label that is wrong in the first `flipped` rows."""
    rng = np.random.default_rng(seed)
    return Dataset.from_list(
        [
            {
                "text": "w1 w2 w3",
                "vector": (3 * np.eye(4)[i % 2] + 0.2 * rng.standard_normal(4)).tolist(),
                "label": "ab"[(i + (i < flipped)) % 2],
                "plain": 1,
            }
            for i in range(size)
        ]
    )


def trained(make_trainer, target, **parameters):
    trainer = make_trainer("lm", dataset=rows(24, 1, flipped=6), max_steps=1)
    given = {"target": target, "embedding": "column:vector", "neighbours": 3, **parameters}
    callback = SelectionCallback(trainer, "knn_shapley", **given)
    trainer.add_callback(callback)
    trainer.train()
    return callback


def test_wrong_labels_are_left_out(make_trainer):
    callback = trained(make_trainer, rows(10, 2), label_column="label", keep=0.75)
    assert np.flatnonzero(callback.ledger.dropped).tolist() == [0, 1, 2, 3, 4, 5]


def test_without_labels_the_like_come_first(make_trainer):
    callback = trained(make_trainer, rows(10, 2).select(range(0, 10, 2)), keep=0.5)
    assert (np.flatnonzero(~callback.ledger.dropped) % 2 == 0).all()


@pytest.mark.parametrize(
    ("target", "column", "message"),
    [
        (rows(4, 2).remove_columns("label"), "label", "label_column='label' of 'target'.*no column 'label'"),
        (rows(4, 2), "names", "label_column='names' of 'train'"),
        (rows(4, 2).remove_columns("label").add_column("label", ["c"] * 4), "label", "shares no label"),
    ],
)
def test_labels_that_say_nothing(make_trainer, target, column, message):
    with pytest.raises(ValueError, match=message):
        trained(make_trainer, target, label_column=column)


@pytest.mark.parametrize("parameters", [{"neighbours": 0}, {"metric": "l1"}])
def test_wrong_parameters(parameters):
    ((name, value),) = parameters.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        create_method("knn_shapley", target="demo", **parameters)
