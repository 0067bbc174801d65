"""Alignment potential: scores from lists, and pairs of the policy's own."""

import numpy as np
import pytest

from dsel_trl import SelectionCallback, create_method
from dsel_trl.functional.preference.alignment_potential import alignment_potential
from dsel_trl.functional.ranking import keep_count, top_k
from tests import tiny


def words(prompts, responses):
    """More words, more reward."""
    return [float(len(response.split())) + (sum(map(ord, response)) % 97) / 1000 for response in responses]


def test_the_spread_of_all_scores_is_the_explicit_margin(make_trainer):
    rng = np.random.default_rng(1)
    scores = [rng.normal(size=int(n)).tolist() for n in rng.integers(1, 5, size=40)]
    scores[3] = [1.0, None]
    dataset = tiny.preferences().add_column("all_rm_scores", scores)
    trainer = make_trainer("dpo", dataset=dataset, max_steps=1)
    callback = SelectionCallback(
        trainer, "alignment_potential", all_scores_column="all_rm_scores", weight=0.0, normalize_margins="none"
    )
    trainer.train()
    found = callback.ledger["alignment_potential"]
    expected = np.array([np.ptp(row) if None not in row else -np.inf for row in scores], dtype=np.float32)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert callback.ledger.dropped[3]


def test_a_column_without_lists_is_refused(make_trainer):
    for column, message in (
        ("score_chosen", "must hold a list"),
        ("nowhere", "all_scores_column='nowhere'.*has no column 'nowhere'"),
    ):
        trainer = make_trainer("dpo", max_steps=1)
        SelectionCallback(trainer, "alignment_potential", all_scores_column=column)
        with pytest.raises(ValueError, match=message):
            trainer.train()


def explicit_of(dataset):
    return np.array(dataset["score_chosen"]) - np.array(dataset["score_rejected"])


def test_the_choice_is_made_once_of_margins_of_one_moment(make_trainer):
    """As in the paper; training does not renew the margins of some pairs and leave those of others."""
    dataset = tiny.preferences()
    trainer = make_trainer("dpo", dataset=dataset, num_train_epochs=3)
    callback = SelectionCallback(trainer, "alignment_potential", keep=0.5)
    trainer.train()
    ledger = callback.ledger
    assert (ledger.steps("alignment_potential_implicit") == 0).all()
    explicit, implicit = explicit_of(dataset), ledger["alignment_potential_implicit"]
    agreeing = np.where(explicit < 0, np.nan, explicit)
    wanted = top_k(alignment_potential(agreeing, implicit), keep_count(0.5, int((explicit >= 0).sum())))
    assert sorted(wanted) == np.flatnonzero(~ledger.dropped).tolist()


@pytest.mark.parametrize(("refresh", "last"), [("epoch", 14), (3, 18)])
def test_every_plan_measures_all_pairs_anew(make_trainer, refresh, last):
    trainer = make_trainer("dpo", num_train_epochs=2, per_device_train_batch_size=2, max_steps=20)
    callback = SelectionCallback(trainer, "alignment_potential", keep=0.5, refresh=refresh)
    trainer.train()
    assert (callback.ledger.steps("alignment_potential_implicit") == last).all()


def test_pairs_whose_scores_contradict_their_labels_are_not_preferred(make_trainer):
    explicit = explicit_of(tiny.preferences())
    assert (explicit < 0).sum() > 3
    for contradicted, trained in (("drop", 0), ("keep", int((explicit < 0).sum()))):
        trainer = make_trainer("dpo", max_steps=1)
        callback = SelectionCallback(trainer, "alignment_potential", keep=1.0, contradicted=contradicted)
        trainer.train()
        assert (~callback.ledger.dropped & (explicit < 0)).sum() == trained
        assert not (callback.ledger.dropped & (explicit > 0)).any()


@pytest.mark.parametrize("form", ["simpo", "dpo"])
def test_a_weight_reads_both_margins_on_the_scales_of_the_dataset(make_trainer, form):
    dataset = tiny.preferences()
    trainer = make_trainer("dpo", dataset=dataset, learning_rate=0.0, max_steps=3, per_device_train_batch_size=4)
    tiny.stir(trainer, scale=0.1)
    witness = tiny.attach(trainer, "alignment_potential", action="weight", form=form, weight=2.0)
    trainer.train()
    implicit = trainer.selection.ledger["alignment_potential_implicit"].astype(np.float64)
    explicit = np.where(explicit_of(dataset) < 0, np.nan, explicit_of(dataset))
    weights = 1 / (1 + np.exp(-alignment_potential(explicit, implicit, weight=2.0)))
    weights = np.nan_to_num(weights)
    for step in witness.steps:
        wanted = weights[step.ids] / weights[step.ids].mean()
        np.testing.assert_allclose(step.values["weight"], wanted, rtol=2e-3)
    assert implicit.std() > 0


def test_a_policy_that_is_its_reference_is_told(make_trainer):
    trainer = make_trainer("dpo", max_steps=1)
    callback = SelectionCallback(trainer, "alignment_potential", form="dpo")
    trainer.train()
    assert any("form='dpo' knows no implicit margin" in note for note in callback.metrics_window.notes.values())


@pytest.mark.parametrize("evolve", [0.0, 0.25])
def test_self_play_adds_pairs_and_keeps_a_share_of_them(make_trainer, evolve):
    parameters = {
        "self_play": 3,
        "evolve": evolve,
        "max_new_tokens": 5,
        "reward": words,
        "keep": 0.5,
        "unfinished": "keep",
    }
    trainer = make_trainer("dpo", num_train_epochs=1, max_length=128)
    witness = tiny.attach(trainer, "alignment_potential", **parameters)
    trainer.train()
    built = trainer.train_dataset
    new = np.array(built["self_play"]) == 1
    assert (~new).sum() == 40
    assert new.sum() >= (20 if evolve == 0 else 1)
    kept = ~trainer.selection.ledger.dropped
    assert kept[~new].tolist() == (ledger_margin(trainer)[~new] >= 0).tolist()
    assert kept[new].sum() == max(1, new.sum() // 2)
    assert {i for ids in witness.ids for i in ids} == set(np.flatnonzero(kept))
    if evolve:
        assert not set(np.array(built["prompt"])[new]) & set(tiny.preferences()["prompt"])
    assert (ledger_margin(trainer)[new] > 0).all()
    implicit = trainer.selection.ledger["alignment_potential_implicit"]
    potential = alignment_potential(ledger_margin(trainer)[new], implicit[new])
    np.testing.assert_allclose(trainer.selection.ledger["alignment_potential"][new], potential, rtol=1e-4, atol=1e-5)
    assert built["difficulty"][:40] == tiny.preferences()["difficulty"][:]


@pytest.mark.parametrize("unfinished", ["drop", "keep"])
def test_self_play_trains_no_response_that_the_cap_has_cut_off(make_trainer, unfinished):
    trainer = make_trainer("dpo", max_steps=1, max_length=128)
    # Any of some words ends a response here, many of them before the cap.
    ends = list(range(1, 80))
    trainer.model.generation_config.eos_token_id = ends
    tiny.attach(
        trainer, "alignment_potential", self_play=2, max_new_tokens=6, reward=words, keep=0.5, unfinished=unfinished
    )
    trainer.train()
    assert 0 < trainer.selection.costs.counts["cut_responses"] < 80
    whole = []
    for row in trainer.train_dataset:
        for side in ("chosen", "rejected") if row["self_play"] else ():
            tokens = trainer._tokenizer(row[side].removesuffix("<eos>"))["input_ids"]
            whole.append(len(tokens) < 6 or tokens[-1] in ends)
    assert len(whole) > 5
    assert all(whole) == (unfinished == "drop")


def ledger_margin(trainer):
    chosen, rejected = (trainer.selection.ledger[f"alignment_potential_reward_{s}"] for s in ("chosen", "rejected"))
    return chosen.astype(np.float64) - rejected


def test_self_play_needs_a_reward():
    for parameters in (
        {"self_play": 3},
        {"self_play": 1, "reward": words},
        {"self_play": 3, "reward": words, "action": "weight"},
    ):
        with pytest.raises(ValueError, match="self_play"):
            create_method("alignment_potential", **parameters)
