"""Curricula by any difficulty: what is open when, controls, and sampling with and without bias."""

import numpy as np
import pytest

from dsel_trl import SelectionCallback, create_method
from dsel_trl.bases.scored import paced
from dsel_trl.functional.pacing import competence, unigram_rarity
from tests import tiny


def served(make_trainer, config=None, **parameters):
    trainer = make_trainer("sft", **(config or {}))
    witness = tiny.attach(trainer, "curriculum", **parameters)
    trainer.train()
    return trainer, np.concatenate(witness.ids), witness


def rarities(trainer):
    rows = [row["input_ids"] for row in trainer.train_dataset]
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    return unigram_rarity(np.concatenate(rows), offsets)


def test_competence_opens_the_rare_ones_late(make_trainer):
    trainer, ids, _ = served(make_trainer, start=0.1, full_at=1.0)
    difficulty = rarities(trainer)
    np.testing.assert_allclose(trainer.selection.ledger["curriculum_rarity"], difficulty, rtol=1e-5)
    rank = np.argsort(np.argsort(difficulty, kind="stable"), kind="stable")
    for position, i in enumerate(ids.tolist()):
        open_now = np.ceil(float(competence(position / 40, 1.0, initial=0.1)) * 40)
        assert rank[i] < max(open_now, position + 1)
    assert sorted(ids.tolist()) == list(range(40))


def test_reverse_and_strict_order(make_trainer):
    difficulty = np.array(tiny.completions()["difficulty"])
    for reverse in (False, True):
        _, ids, _ = served(make_trainer, by="column", column="difficulty", pacing="none", reverse=reverse)
        assert ids.tolist() == np.argsort(-difficulty if reverse else difficulty).tolist()


def test_the_control_opens_a_random_pool(make_trainer):
    parameters = {"by": "column", "column": "difficulty", "start": 0.2, "full_at": 1.0, "pacing": "linear"}
    difficulty = np.array(tiny.completions()["difficulty"])
    _, ids, _ = served(make_trainer, **parameters)
    _, control, _ = served(make_trainer, random_order=True, **parameters)
    assert np.corrcoef(difficulty[ids], np.arange(40))[0, 1] > 0.4
    assert abs(np.corrcoef(difficulty[control], np.arange(40))[0, 1]) < 0.4


def follows(difficulty):
    """How far an order goes from easy to hard: the correlation with its positions."""
    return np.corrcoef(difficulty, np.arange(len(difficulty)))[0, 1]


def test_pacing_over_the_run(make_trainer):
    parameters = {"by": "column", "column": "difficulty", "pacing": "linear", "start": 0.25, "keep": 0.5}
    config = {"num_train_epochs": 4}
    difficulty = np.array(tiny.completions()["difficulty"])
    _, each, _ = served(make_trainer, config, **parameters)
    _, over, _ = served(make_trainer, config, pacing_over="run", full_at=1.0, **parameters)
    # Every epoch serves the easier half. The first one of a pacing over the run opens it more slowly than a pacing
    # over each epoch, so the easiest come sooner; in its last one nearly all is open from the start, so the order is
    # random.
    for ids in (each, over):
        assert all(set(part) == set(np.argsort(difficulty)[:20]) for part in ids.reshape(4, 20))
    assert follows(difficulty[over[:20]]) > follows(difficulty[each[:20]])
    assert follows(difficulty[over[:20]]) > 0.9
    assert abs(follows(difficulty[over[-20:]])) < 0.5


@pytest.mark.parametrize("reverse", [False, True])
def test_sampling_follows_the_difficulty(make_trainer, reverse):
    difficulty = np.array(tiny.completions()["difficulty"])
    parameters = {"by": "column", "column": "difficulty", "action": "sample", "keep": 0.5, "temperature": 0.05}
    _, ids, _ = served(make_trainer, reverse=reverse, **parameters)
    easy = difficulty[ids].mean() < difficulty.mean()
    assert easy != reverse
    assert len(ids) == len(set(ids.tolist())) == 20


def test_unbiased_sampling_weighs_by_the_inverse_probability(make_trainer):
    parameters = {"by": "column", "column": "difficulty", "action": "sample", "keep": 0.5, "temperature": 0.5}
    _, _, witness = served(make_trainer, {"per_device_train_batch_size": 4}, unbiased=True, clip=1e9, **parameters)
    difficulty = np.array(tiny.completions()["difficulty"])
    for step in witness.steps:
        raw = np.exp(difficulty[step.ids] / 0.5)
        np.testing.assert_allclose(step.values["weight"], raw / raw.mean(), rtol=1e-4)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"by": "size"}, "by='size'"),
        ({"by": "column"}, "by='column'"),
        ({"column": "x"}, "column='x'"),
        ({"unbiased": True}, "unbiased=True"),
        ({"pacing_over": "step"}, "pacing_over='step'"),
        ({"action": "weight"}, "action='weight'"),
    ],
)
def test_wrong_parameters(parameters, message):
    with pytest.raises(ValueError, match=message):
        create_method("curriculum", **parameters)


def test_a_missing_column(make_trainer):
    with pytest.raises(ValueError, match="nothing"):
        SelectionCallback(make_trainer("sft"), "curriculum", by="column", column="nothing")


def test_equally_hard_examples_open_together():
    scores = -np.repeat([0.0, 1.0, 2.0], [4, 12, 4])
    rng = np.random.default_rng(0)

    def order(together):
        options = {"served": 0, "epoch_length": 20, "rng": rng, "blocks": 20, "ties_together": together}
        return paced(scores, np.arange(20), lambda p: min(1.0, 0.2 + p), **options).tolist()

    for _ in range(10):
        ids = order(True)
        assert sorted(ids) == list(range(20))
        assert set(ids[:4]) == {0, 1, 2, 3}
        # The twelve open at 80% of the difficulties: before, they come by id, where nothing else is left.
        assert ids[4:12] == list(range(4, 12))
    assert any(order(False)[4:12] != list(range(4, 12)) for _ in range(10))


def test_grouped_lengths_are_a_random_order_of_like_neighbours(make_trainer):
    def run(**config):
        trainer = make_trainer("sft", per_device_train_batch_size=2, **config)
        witness = tiny.attach(trainer, "length_curriculum", action="grouped", by="total")
        trainer.train()
        return trainer.selection.run.lengths, np.concatenate(witness.ids)

    lengths, ids = run()
    assert sorted(ids.tolist()) == list(range(40))
    assert lengths[ids[0]] == lengths.max()
    # 40 examples in steps of 2: mega-batches of 10, each from long to short (the longest of all was put first).
    blocks = lengths[ids].reshape(4, 10)[1:]
    assert sum((np.diff(block) > 0).sum() for block in blocks) <= 1
    assert ids.tolist() != run(seed=7)[1].tolist()
