"""Values by which a run logs apart: of any column of texts, few enough to be looked at."""

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset

from dsel_trl.core.groups import Groups
from dsel_trl.core.metrics import Metrics
from dsel_trl.core.run import Step
from dsel_trl.data.rows import Layout, Rows
from tests.runs import make_run


def rows_of(values):
    return Rows("train", Dataset(pa.table({"source": values})), Layout(), tokenizer=None, collate=lambda ids: {})


@pytest.mark.parametrize(
    ("values", "names", "codes"),
    [
        (pa.array(["web", "code", "web"]), ["source=code", "source=web"], [1, 0, 1]),
        (pa.array(["web", "code", "web"]).dictionary_encode(), ["source=code", "source=web"], [1, 0, 1]),
        (pa.array(["a/b", "a=b", "50%\n"]), ["source=50%25%0A", "source=a%2Fb", "source=a%3Db"], [1, 2, 0]),
        (pa.array(["Füße", None, "Füße"]), ["source=Füße", "source=null"], [0, 1, 0]),
        (pa.array([2, 1, 2]), ["source=1", "source=2"], [1, 0, 1]),
        (pa.array([True, False, True]), ["source=false", "source=true"], [1, 0, 1]),
    ],
)
def test_names_and_codes(values, names, codes):
    groups = Groups.of(rows_of(values), "source")
    assert groups.names() == names
    assert groups.codes.tolist() == codes


@pytest.mark.parametrize(
    ("values", "column", "message"),
    [
        (pa.array(["a"]), "sourse", r"log_by='sourse': there is no such column, only \['source'\]"),
        (pa.array([0.5]), "source", "'source' holds double, but texts are needed"),
        (pa.array([["a"]]), "source", "holds list"),
        (pa.array([f"row {i}" for i in range(51)]), "source", "51 different values .*at most 50"),
    ],
)
def test_what_cannot_be_logged_apart(values, column, message):
    with pytest.raises(ValueError, match=message):
        Groups.of(rows_of(values), column)


def test_a_window_and_the_whole_run():
    groups = Groups("source", ["code", "web"], np.array([0, 0, 1, 1, 1, 0]))
    metrics, run = Metrics(groups), make_run(6)
    metrics.planned(np.array([True, False, True, True, True, False]), None)
    values = {"loss": [1.0, 3.0, np.nan], "weight": [0.5, 1.5, 1.0], "length": [10.0, 20.0, 30.0]}
    metrics.step(Step(np.array([0, 2, 3]), {name: np.float32(value) for name, value in values.items()}), served=3)
    run.ledger.visit(np.array([0, 2, 3]))
    row = metrics.row(run.ledger, run)
    own = {key.removeprefix("selection/"): value for key, value in row.items() if "source=" in key}
    assert own == {
        "source=code/kept_fraction": pytest.approx(1 / 3),
        "source=web/kept_fraction": 1.0,
        "source=code/loss": 1.0,
        "source=web/loss": 3.0,
        "source=code/weight": 0.5,
        "source=web/weight": 1.25,
        "source=code/tokens": 10.0,
        "source=web/tokens": 50.0,
    }
    assert metrics.summary(run.ledger)["log_by"] == {
        "source": {"code": {"examples": 3, "examples_trained": 1}, "web": {"examples": 3, "examples_trained": 2}}
    }
    # Of candidates: 1 of 2 of `code`, none of `web` was there.
    metrics.picked(np.array([0, 1]), np.array([1]))
    row = metrics.row(run.ledger, run)
    assert row["selection/source=code/kept_fraction"] == 0.5
    assert row["selection/source=web/kept_fraction"] == 1.0
    assert "selection/source=web/loss" not in row
