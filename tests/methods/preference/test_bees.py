"""BeeS: sources, fusion, what is kept, and what a resume finds."""

import numpy as np
import pytest

from dsel_trl import SelectionCallback, create_method
from dsel_trl.functional.preference.bees import fuse_probabilities, margin_probability, upper_bound
from tests import tiny
from tests.methods import live


def with_column(name, values):
    return tiny.preferences().add_column(name, np.asarray(values, dtype=np.float64))


def fused_by_hand(margins, divisors):
    uppers = [upper_bound(m, d) for m, d in zip(margins, divisors, strict=True)]
    return fuse_probabilities([margin_probability(m, -2.0, u) for m, u in zip(margins, uppers, strict=True)])


def test_the_kept_pairs_are_those_of_the_highest_fused_probability(make_trainer):
    other = np.random.default_rng(3).normal(1.0, 2.0, 40)
    dataset = with_column("other", other)
    trainer = make_trainer("dpo", dataset=dataset)
    witness = tiny.attach(trainer, "bees", sources=["explicit", "column:other"], keep=0.3)
    trainer.train()
    explicit = np.array(dataset["score_chosen"]) - np.array(dataset["score_rejected"])
    fused = fused_by_hand([explicit, other], [1.5, 1.5])
    kept = ~trainer.selection.ledger.dropped
    assert kept.sum() == 12
    assert fused[kept].min() >= fused[~kept].max()
    assert {i for ids in witness.ids for i in ids} == set(np.flatnonzero(kept))


def test_a_helper_model_gives_margins_once(make_trainer, tmp_path):
    settings = {"output_dir": tmp_path / "run", "max_steps": 1}
    runs = []
    for _ in range(2):
        trainer = make_trainer("dpo", **settings)
        callback = SelectionCallback(
            trainer, "bees", sources=["helper"], seed_pairs=8, helper_epochs=1, helper_lora=False
        )
        trainer.train()
        runs.append(callback.ledger["bees_helper"].copy())
        files = sorted((tmp_path / "run" / "selection").glob("bees-helper-*"))
        assert len(files) == 1
        times = files[0].stat().st_mtime_ns
    assert files[0].stat().st_mtime_ns == times
    assert np.isfinite(runs[0]).all()
    assert runs[0].std() > 0
    np.testing.assert_array_equal(runs[0], runs[1])


def test_the_policys_own_margins_are_measured_anew(make_trainer):
    trainer = make_trainer("dpo", num_train_epochs=2)
    callback = SelectionCallback(trainer, "bees", sources=["implicit", "explicit"], refresh="epoch", keep=0.5)
    trainer.train()
    assert (callback.ledger.steps("bees_implicit") == 10).all()
    assert callback.ledger["bees_implicit"].std() > 0


def test_iterative_choice_resumes_bit_for_bit(make_trainer, tmp_path):
    config = {"num_train_epochs": 2, "max_steps": -1, "save_steps": 3, "per_device_train_batch_size": 4}
    (whole, trace), (resumed, resumed_trace) = live.resumed_state(
        make_trainer, "bees", tmp_path, config, sources=["implicit", "explicit"], refresh="epoch", keep=0.5
    )
    np.testing.assert_array_equal(whole["fused"], resumed["fused"])
    resumed_trace.assert_ends_as(trace)


def test_as_a_weight(make_trainer):
    trainer = make_trainer("dpo", per_device_train_batch_size=4, max_steps=2)
    witness = tiny.attach(trainer, "bees", sources=["explicit"], action="weight")
    trainer.train()
    fused = trainer.selection.ledger["bees"]
    for step in witness.steps:
        weights = fused[step.ids] / fused[step.ids].mean()
        np.testing.assert_allclose(step.values["weight"], weights, rtol=1e-5)


@pytest.mark.parametrize(("refresh", "last"), [("never", 0), (2, 4), ("epoch", 4)])
def test_weights_follow_the_margins_of_the_policy(make_trainer, refresh, last):
    trainer = make_trainer("dpo", per_device_train_batch_size=10, num_train_epochs=2, max_steps=6, learning_rate=0.01)
    sources = ["explicit", "implicit"]
    witness = tiny.attach(trainer, "bees", sources=sources, action="weight", refresh=refresh)
    trainer.train()
    ledger = trainer.selection.ledger
    assert set(ledger.steps("bees_implicit")) == {last} or refresh == "epoch"
    assert (ledger.steps("bees_implicit") > 0).all() == (refresh != "never")
    if refresh != "never":
        step, fused = witness.steps[-1], ledger["bees"]
        np.testing.assert_allclose(step.values["weight"], fused[step.ids] / fused[step.ids].mean(), rtol=1e-4)
        assert ledger["bees_implicit"].std() > 0


def test_the_share_is_of_all_pairs(make_trainer):
    trainer = make_trainer("dpo", max_steps=1)
    callback = SelectionCallback(trainer, "bees", sources=["explicit"], keep=7 / 40)
    trainer.train()
    assert (~callback.ledger.dropped).sum() == 7


def test_pairs_that_no_source_knows_are_left_out(make_trainer):
    """Of those of which nothing is known none is trained; the share kept is one of the others."""
    margins = np.where(np.arange(40) % 4 == 0, np.nan, np.linspace(-3.0, 3.0, 40))
    trainer = make_trainer("dpo", dataset=with_column("other", margins), max_steps=1)
    callback = SelectionCallback(trainer, "bees", sources=["column:other"], keep=0.7)
    trainer.train()
    best = np.argsort(np.nan_to_num(margins, nan=-np.inf))[-21:]
    assert sorted(np.flatnonzero(~callback.ledger.dropped)) == sorted(best)


def test_missing_scores_leave_a_source_out(make_trainer):
    other = np.full(40, np.nan)
    other[:5] = 50.0
    fused = []
    for sources in (["explicit"], ["column:other", "explicit"]):
        trainer = make_trainer("dpo", dataset=with_column("other", other), max_steps=1)
        callback = SelectionCallback(trainer, "bees", sources=sources, keep=0.25)
        trainer.train()
        fused.append(callback.ledger["bees"])
    np.testing.assert_allclose(fused[1][5:], fused[0][5:], rtol=1e-6)
    assert (fused[1][:5] > fused[0][:5]).all()


def test_a_pair_that_no_source_knows_is_not_trained(make_trainer):
    other = np.full(40, np.nan)
    other[:5] = np.arange(-2.0, 3.0)
    trainer = make_trainer("dpo", dataset=with_column("other", other), max_steps=1)
    callback = SelectionCallback(trainer, "bees", sources=["column:other"], keep=1.0)
    trainer.train()
    assert np.isnan(callback.ledger["bees"][5:]).all()
    assert callback.ledger.dropped.tolist() == [False] * 5 + [True] * 35


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"sources": []}, "at least one"),
        ({"sources": ["explicit", "explicit"]}, "none twice"),
        ({"sources": ["explict"]}, "explicit"),
        ({"fusion": "sum"}, "fusion='sum'"),
        ({"keep": 0}, "keep=0"),
    ],
)
def test_wrong_parameters(parameters, message):
    with pytest.raises(ValueError, match=message):
        create_method("bees", **parameters)
