"""Alignment potential: scores from lists, and pairs of the policy's own."""

import numpy as np
import pytest

from dsel_trl import SelectionCallback, create_method
from tests import tiny


@pytest.fixture(autouse=True)
def _no_picture(no_picture):
    """Every run of this file ends without a picture."""


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


@pytest.mark.parametrize("evolve", [0.0, 0.25])
def test_self_play_adds_pairs_and_keeps_a_share_of_them(make_trainer, evolve):
    parameters = {"self_play": 3, "evolve": evolve, "max_new_tokens": 5, "reward": words, "keep": 0.5}
    trainer = make_trainer("dpo", num_train_epochs=1, max_length=128)
    witness = tiny.attach(trainer, "alignment_potential", **parameters)
    trainer.train()
    built = trainer.train_dataset
    new = np.array(built["self_play"]) == 1
    assert (~new).sum() == 40
    assert new.sum() >= (20 if evolve == 0 else 1)
    kept = ~trainer.selection.ledger.dropped
    assert kept[~new].all()
    assert kept[new].sum() == max(1, new.sum() // 2)
    assert {i for ids in witness.ids for i in ids} == set(np.flatnonzero(kept))
    if evolve:
        assert not set(np.array(built["prompt"])[new]) & set(tiny.preferences()["prompt"])
    rewards = trainer.selection.ledger["alignment_potential_reward_chosen"]
    assert (rewards[new] > trainer.selection.ledger["alignment_potential_reward_rejected"][new]).all()


def test_self_play_needs_a_reward():
    for parameters in (
        {"self_play": 3},
        {"self_play": 1, "reward": words},
        {"self_play": 3, "reward": words, "action": "weight"},
    ):
        with pytest.raises(ValueError, match="self_play"):
            create_method("alignment_potential", **parameters)
