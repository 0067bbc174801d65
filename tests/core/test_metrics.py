"""The `selection/*` values: of the window, of the run, and of what is left in a checkpoint."""

import json

import numpy as np
import pytest

from dsel_trl.core.ledger import Ledger
from dsel_trl.core.metrics import Metrics
from dsel_trl.core.run import Step
from tests.runs import make_run


def step(ids, **values):
    return Step(np.array(ids), {name: np.float32(value) for name, value in values.items()})


@pytest.fixture
def run():
    return make_run(6, step=10)


def test_weights_and_scores_of_a_window(run):
    metrics = Metrics()
    run.ledger.write("score", [0, 1], [5.0, 1.0], step=4)
    run.ledger.write("score", [2], [3.0], step=10)
    metrics.step(step([0, 1], loss=[1.0, 2.0], weight=[2.0, 0.0], score=[5.0, 1.0]), served=4)
    metrics.step(step([2, 3], loss=[3.0, 5.0], weight=[1.0, 1.0], score=[3.0, np.nan]), served=6)
    row = metrics.row(run.ledger, run)
    assert row["selection/weight_mean"] == 1.0
    assert row["selection/weight_min"] == 0.0
    assert row["selection/weight_max"] == 2.0
    # (2 + 0)^2 / 4 = 1 and (1 + 1)^2 / 2 = 2.
    assert row["selection/effective_sample_size"] == 1.5
    assert row["selection/weighted_loss"] == pytest.approx((2 + 0 + 3 + 5) / 4)
    assert row["selection/score_q50"] == 3.0
    assert row["selection/score_q10"] == pytest.approx(1.4)
    assert row["selection/score_age"] == pytest.approx(10 - (4 + 4 + 10) / 3)
    assert row["selection/sampler_lag"] == 2
    # The window starts anew; what the run counts does not.
    assert "selection/weight_mean" not in metrics.row(run.ledger, run)
    assert [entry["step"] for entry in metrics.history] == [10.0, 10.0]


def test_without_weights_every_example_counts_as_one(run):
    metrics = Metrics()
    metrics.step(step([0, 1, 2], loss=[1.0, 2.0, 6.0]), served=3)
    row = metrics.row(run.ledger, run)
    assert row["selection/weighted_loss"] == 3.0
    assert row["selection/effective_sample_size"] == 3.0
    assert row["selection/weight_mean"] == 1.0


def test_a_step_of_zero_weights(run):
    metrics = Metrics()
    metrics.step(step([0, 1], loss=[1.0, 2.0], weight=[0.0, 0.0]), served=2)
    row = metrics.row(run.ledger, run)
    assert row["selection/effective_sample_size"] == 0.0
    assert np.isfinite(list(row.values())).all()


def test_what_is_kept_and_skipped(run):
    metrics = Metrics()
    metrics.planned(np.array([True, False, True, False]), np.array([10, 20, 30, 40]))
    row = metrics.row(run.ledger, run)
    assert row["selection/kept_fraction"] == 0.5
    assert row["selection/examples_skipped"] == 2
    assert row["selection/tokens_skipped"] == 60


def test_what_is_picked(run):
    metrics = Metrics()
    metrics.picked(np.arange(8), np.arange(2))
    metrics.picked(np.arange(8), np.arange(2))
    assert metrics.row(run.ledger, run)["selection/kept_fraction"] == 0.25
    assert metrics.summary(run.ledger)["candidates_scored"] == 16
    assert metrics.summary(run.ledger)["examples_skipped"] == 12


def test_lag_is_counted_within_the_epoch(run):
    metrics = Metrics()
    metrics.step(step([0, 1], loss=[0, 0]), served=6)
    assert metrics.lag == 4
    metrics.step(step([2, 3], loss=[0, 0]), served=6)
    assert metrics.lag == 2
    metrics.step(step([4, 5], loss=[0, 0]), served=4)
    assert metrics.lag == 2, "a new epoch has begun"
    metrics.step(step([4, 5], loss=[0, 0]), served=0)
    assert metrics.lag == 0


def test_a_methods_own_values_are_averaged(run):
    metrics = Metrics()
    metrics.extra({"threshold": 1.0})
    metrics.extra({"threshold": 4.0, "other": 2})
    row = metrics.row(run.ledger, run)
    assert row["selection/threshold"] == 2.5
    assert row["selection/other"] == 2.0
    assert "selection/threshold" not in metrics.row(run.ledger, run)


def test_state_survives_json(run):
    metrics = Metrics()
    metrics.picked(np.arange(4), np.arange(2))
    metrics.step(step([0], loss=[1.0]), served=2)
    metrics.row(run.ledger, run)
    state = json.loads(json.dumps(metrics.state_dict()))
    other = Metrics()
    other.load_state_dict(state)
    assert other.summary(run.ledger) == metrics.summary(run.ledger)
    assert other.history == metrics.history
    for one in (metrics, other):
        one.step(step([1, 2], loss=[1.0, 2.0]), served=4)
    assert other.row(run.ledger, run) == metrics.row(run.ledger, run)


def test_summary_counts_the_ledger(run):
    metrics = Metrics()
    run.ledger.visit(np.array([0, 0, 3]))
    run.ledger.drop(np.array([False, True, False, False, False, False]), "x")
    summary = metrics.summary(run.ledger)
    assert summary["examples"] == 6
    assert summary["examples_visited"] == 2
    assert summary["selected_fraction"] == pytest.approx(2 / 6)
    assert Metrics().summary(Ledger())["selected_fraction"] == 0.0
    assert summary["examples_dropped"] == 1
