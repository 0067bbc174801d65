"""InfoBatch: both schedules, exact weights, and an annealing that always resets."""

import numpy as np
import pytest

from dsel_trl import create_method
from dsel_trl.core.ledger import Ledger
from dsel_trl.core.run import Step
from dsel_trl.functional.loss.infobatch import infobatch_prune
from tests import tiny
from tests.methods import live
from tests.runs import make_run


def trained(make_trainer, config=None, **parameters):
    settings = {"num_train_epochs": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-3, **(config or {})}
    trainer = make_trainer("sft", **settings)
    witness = tiny.attach(trainer, "infobatch", **parameters)
    trainer.train()
    return trainer, witness


def test_candidates_are_decided_by_the_mean_of_all():
    scores = np.array([0.0, 0.1, 0.2, 9.0, 0.3, 9.0])
    ids, weights = infobatch_prune(scores, np.random.default_rng(0), prune_ratio=0.5, candidates=[0, 2, 3])
    assert len(ids) == 2
    assert 3 in ids
    assert set(ids.tolist()) <= {0, 2, 3}
    assert weights[[i for i in ids if i != 3]].tolist() == [2.0]
    whole = infobatch_prune(scores, np.random.default_rng(1))
    asked = infobatch_prune(scores, np.random.default_rng(1), candidates=np.arange(6))
    np.testing.assert_array_equal(whole[0], asked[0])


@pytest.mark.parametrize("delta", [0.5, 0.6])
@pytest.mark.parametrize("refresh", ["epoch", 2])
def test_the_last_part_of_the_run_has_weight_one(make_trainer, refresh, delta):
    """Also where delta times the epochs is no whole number, which the published code forgets."""
    _, witness = trained(make_trainer, delta=delta, refresh=refresh, keep_learned=0.5)
    weights = [step.values["weight"] for step in witness.steps]
    assert max(w.max() for w in weights) == 2.0
    # What was planned just before the end of the pruning may still be on its way for some steps.
    late = weights[int(delta * len(weights)) + (10 if refresh == "epoch" else 4) :]
    assert late
    assert all((w == 1.0).all() for w in late)


def planner(**parameters):
    """A run whose losses are known and fixed, and the method on it."""
    size = 64
    ledger = Ledger(size)
    ledger.write("loss", None, np.linspace(0.1, 2.0, size) ** 2, 1)
    run = make_run(size, trainer="sft", ledger=ledger, epochs=1e9)
    run.arguments.per_device_train_batch_size = 4
    method = create_method("infobatch", **parameters)
    method.setup(run)
    return run, method


def one_pass(run, method):
    """The plans of one pass, each trained before the next is made."""
    plans = []
    while not plans or len(method._undecided):
        plans.append(method.plan(run, 0))
        method.observe(run, Step(plans[-1], {}))
        run.plans_made += 1
    return plans


@pytest.mark.parametrize("refresh", ["epoch", 1, 3])
def test_expected_weight_of_every_example_is_one(refresh):
    """Over many passes over fixed losses, the weights of an example sum to the number of passes."""
    passes = 3000
    run, method = planner(refresh=refresh, delta=1.0, exact_weight=True)
    total = np.zeros(run.size)
    for _ in range(passes):
        for ids in one_pass(run, method):
            np.add.at(total, ids, method._weights[ids])
    np.testing.assert_allclose(total / passes, 1.0, atol=0.1)


@pytest.mark.parametrize("refresh", ["epoch", 1, 3])
def test_every_example_is_decided_on_once_per_pass(refresh):
    run, method = planner(refresh=refresh, delta=1.0)
    for _ in range(3):
        ids = np.concatenate(one_pass(run, method))
        assert len(ids) == len(set(ids.tolist())) < run.size
        assert set(np.flatnonzero(~run.ledger.dropped)) == set(ids.tolist())


def test_prescoring_prunes_the_first_pass(make_trainer):
    one, first = trained(make_trainer, {"num_train_epochs": 2}, prescore=True)
    assert max(step.values["weight"].max() for step in first.steps[:5]) == 2.0
    _, without = trained(make_trainer, {"num_train_epochs": 2})
    assert max(step.values["weight"].max() for step in without.steps[:5]) == 1.0
    assert np.isfinite(one.selection.ledger["loss"]).all()


@pytest.mark.parametrize("parameters", [{}, {"refresh": 2, "prescore": True}])
def test_resumes_bit_for_bit(make_trainer, tmp_path, parameters):
    config = {"num_train_epochs": 3, "max_steps": -1, "save_steps": 3}
    (whole, trace), (resumed, resumed_trace) = live.resumed_state(
        make_trainer, "infobatch", tmp_path, config, **parameters
    )
    for name, array in whole.items():
        np.testing.assert_array_equal(array, resumed[name])
    resumed_trace.assert_ends_as(trace)


@pytest.mark.parametrize(
    ("refresh", "message"), [(0, "refresh=0"), (1.5, "refresh=1.5"), ("never", "refresh='never'")]
)
def test_wrong_parameters(refresh, message):
    with pytest.raises(ValueError, match=message):
        create_method("infobatch", refresh=refresh)


def test_short_passes_do_not_end_the_pruning_early():
    """Of many well-learned examples a pass is short: the eighth begins at 77% of the training, and still prunes."""
    losses = np.where(np.arange(64) < 56, 0.1, 9.0)
    weights = {}
    for step in (77, 89):
        method = create_method("infobatch")
        run = make_run(64, step=step, max_steps=100, epochs=8, epoch=6, plans_made=7)
        run.ledger.write("loss", None, losses, step=0)
        method.setup(run)
        ids = method.plan(run, 6)
        weights[step] = method._weights[ids]
    assert weights[77].max() == 2
    assert (weights[89] == 1).all()
