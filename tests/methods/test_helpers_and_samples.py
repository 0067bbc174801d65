"""Methods that train a helper model (rho_loss, s2l) or sample from the policy (filtered_dpo)."""

from itertools import pairwise

import numpy as np
import pytest

from dsel_trl import SelectionCallback, create_method
from tests import tiny
from tests.methods import live


def losses(values, name="irreducible_loss"):
    return tiny.preferences().add_column(name, np.asarray(values, dtype=np.float64))


# ---- rho_loss ----


def test_the_largest_reducible_losses_are_trained(make_trainer):
    floors = np.linspace(-3.0, 3.0, 40)
    floors[7] = np.nan
    trainer = make_trainer("dpo", dataset=losses(floors), learning_rate=0.0, per_device_train_batch_size=10)
    tiny.stir(trainer, scale=0.1)
    witness = tiny.attach(trainer, "rho_loss", source="column", factor=4)
    trainer.train()
    (step,) = witness.steps
    callback = trainer.selection
    margins = callback.run.passes.measure(lambda batch: batch.loss)
    reducible = margins - np.where(np.isfinite(floors), floors, np.nanmedian(floors))
    assert set(step.ids) == set(np.argsort(-reducible)[:10])
    np.testing.assert_allclose(step.values["rho_loss"], reducible[step.ids], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["dpo", "sft"])
def test_helpers_score_what_they_have_not_seen(make_trainer, kind, tmp_path):
    trainer = make_trainer(kind, max_steps=1)
    callback = SelectionCallback(trainer, "rho_loss", factor=2, helper_lora=False)
    trainer.train()
    found = callback.ledger["rho_loss_irreducible"]
    assert np.isfinite(found).all()
    assert found.std() > 0
    assert len(list((tmp_path / "out" / "selection").glob("irreducible-loss-*"))) == 1


def test_the_holdout_is_not_trained(make_trainer):
    trainer = make_trainer("dpo", num_train_epochs=2)
    witness = tiny.attach(trainer, "rho_loss", source="holdout", holdout=0.25, factor=2, helper_lora=False)
    trainer.train()
    known = np.isfinite(trainer.selection.ledger["rho_loss_irreducible"])
    assert known.sum() == 30
    trained = {i for ids in witness.ids for i in ids}
    assert trained <= set(np.flatnonzero(known))


# ---- s2l ----


def test_clusters_share_the_budget(make_trainer):
    """Thirty-four easy pairs and six hard ones: half of the budget is for the hard ones."""
    rows = tiny.preferences().add_column("losses", [[1.0, 0.1, 0.0]] * 34 + [[5.0, 5.0, 5.0]] * 6)
    trainer = make_trainer("dpo", dataset=rows, max_steps=1)
    callback = SelectionCallback(trainer, "s2l", trajectory_column="losses", clusters=40, keep=0.25)
    trainer.train()
    kept = ~callback.ledger.dropped
    assert (kept[:34].sum(), kept[34:].sum()) == (5, 5)


def test_examples_without_a_loss_are_not_drawn(make_trainer):
    rows = tiny.preferences().add_column("losses", [[1.0, 0.5]] * 10 + [[np.nan, np.nan]] * 20 + [[3.0, 3.0]] * 10)
    trainer = make_trainer("dpo", dataset=rows, max_steps=1)
    callback = SelectionCallback(trainer, "s2l", trajectory_column="losses", clusters=3, keep=0.5)
    trainer.train()
    assert (~callback.ledger.dropped).tolist() == [True] * 10 + [False] * 20 + [True] * 10


def test_sources_share_the_budget(make_trainer):
    rows = tiny.preferences().add_column("losses", np.random.default_rng(0).normal(size=(40, 3)).tolist())
    rows = rows.add_column("origin", ["a"] * 30 + ["b"] * 10)
    trainer = make_trainer("dpo", dataset=rows, max_steps=1)
    callback = SelectionCallback(
        trainer, "s2l", trajectory_column="losses", source_column="origin", clusters=3, keep=0.4
    )
    trainer.train()
    kept = ~callback.ledger.dropped
    assert (kept[:30].sum(), kept[30:].sum()) == (8, 8)


@pytest.mark.parametrize(("parameters", "rate"), [({}, 2e-5), ({"helper_lora": True}, 3e-4)], ids=["whole", "lora"])
def test_s2l_trains_its_helper_as_the_authors_do(make_trainer, monkeypatch, parameters, rate):
    seen = []

    def look(trainer, helper, train_ids):
        adapter = any("lora" in name for name, _ in helper.model.named_parameters())
        seen.append((adapter, helper.args.num_train_epochs, helper.args.learning_rate))

    monkeypatch.setattr("dsel_trl.trainer.helper_run._count", look)
    trainer = make_trainer("dpo", max_steps=1, learning_rate=1e-6)
    SelectionCallback(trainer, "s2l", clusters=4, checkpoints=2, **parameters)
    trainer.train()
    assert seen == [(bool(parameters), 3.0, rate)]


def test_s2l_resumes_without_another_helper(make_trainer, tmp_path):
    config = {"max_steps": 5}
    parameters = {"checkpoints": 2, "clusters": 4, "helper_lora": False, "keep": 0.8}
    (whole, trace), (resumed, resumed_trace) = live.resumed_state(make_trainer, "s2l", tmp_path, config, **parameters)
    np.testing.assert_array_equal(whole["mask"], resumed["mask"])
    resumed_trace.assert_ends_as(trace)
    assert not list((tmp_path / "resumed" / "selection").glob("loss-traj*"))


# ---- filtered_dpo ----


def even_is_good(prompts, responses):
    """Chosen responses of even rows carry a mark that no policy writes."""
    return [10.0 if "MARK" in response else 0.0 for response in responses]


def marked():
    rows = [dict(row) for row in tiny.preferences()]
    for row in rows[::2]:
        row["chosen"] += " MARK"
    return tiny.Dataset.from_list(rows)


def test_pairs_that_the_policy_surpasses_are_dropped(make_trainer):
    trainer = make_trainer("dpo", dataset=marked(), num_train_epochs=2)
    witness = tiny.attach(trainer, "filtered_dpo", reward=even_is_good, max_new_tokens=4)
    trainer.train()
    assert set(np.flatnonzero(trainer.selection.ledger.dropped)) == set(range(1, 40, 2))
    assert {i for ids in witness.ids for i in ids} == set(range(0, 40, 2))
    assert (trainer.selection.ledger["filtered_dpo_sample"][::2] == 0).all()


def test_dropped_pairs_never_return_and_the_last_set_stays(make_trainer, tmp_path):
    calls = []

    def worse_each_time(prompts, responses):
        calls.append(len(responses))
        return [float(len(calls)) * (len(response) % 3) for response in responses]

    trainer = make_trainer("dpo", num_train_epochs=3, max_steps=-1)
    callback = SelectionCallback(trainer, "filtered_dpo", reward=worse_each_time, max_new_tokens=4)
    left = []
    callback.methods.methods[0].observe = lambda run, step: None
    select = callback.methods.methods[0].select
    callback.methods.methods[0].select = lambda run: left.append(select(run).copy()) or left[-1]
    trainer.train()
    for before, after in pairwise(left):
        assert not (after & ~before).any()
    assert left[-1].any()


def test_filtering_starts_at_its_epoch_and_resumes(make_trainer, tmp_path):
    config = {"num_train_epochs": 4, "max_steps": -1, "save_steps": 6, "per_device_train_batch_size": 4}
    parameters = {"reward": even_is_good, "start_epoch": 1, "max_new_tokens": 4}
    config["dataset"] = marked()
    found = []
    # In the first pass, in the second, and in the last, which goes over a border of the trainer's epochs.
    for resume in (None, 6, 12, 18):
        trainer = make_trainer("dpo", output_dir=tmp_path / "run", save_strategy="steps", **config)
        method = create_method("filtered_dpo", **parameters)
        witness = tiny.attach(trainer, method)
        trainer.train(resume_from_checkpoint=resume and str(tmp_path / "run" / f"checkpoint-{resume}"))
        found.append(tiny.Trace.of(trainer, witness))
    assert sorted(i for ids in found[0].ids[:10] for i in ids) == list(range(40))
    assert {i for ids in found[0].ids[10:] for i in ids} == set(range(0, 40, 2))
    for resumed in found[1:]:
        resumed.assert_ends_as(found[0])


@pytest.mark.parametrize(("epochs", "steps"), [(3, 20), (4, 25), (3.5, 23)])
def test_an_epoch_is_one_pass_over_what_is_left(make_trainer, tmp_path, epochs, steps):
    """Forty pairs, of which twenty stay from the second pass on: the trainer alone would make 10 steps per epoch."""
    config = {"max_steps": -1, "per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 1000}
    trainer = make_trainer("dpo", dataset=marked(), num_train_epochs=epochs, output_dir=tmp_path / "run", **config)
    witness = tiny.attach(trainer, "filtered_dpo", reward=even_is_good, start_epoch=1, max_new_tokens=4)
    trainer.train()
    assert trainer.state.global_step == steps
    assert (tmp_path / "run" / f"checkpoint-{steps}").is_dir(), "the last step is not saved"
    ids = [i for step in witness.ids for i in step]
    assert sorted(ids[:40]) == list(range(40))
    for start in range(40, len(ids) - 19, 20):
        assert sorted(ids[start : start + 20]) == list(range(0, 40, 2))
    # Nothing is sampled for a pass of which nothing is trained.
    assert trainer.selection.costs.counts["generated_responses"] == 40 + 20 * (int(np.ceil(epochs)) - 2)


@pytest.mark.parametrize(
    "other",
    [
        {"name": "curriculum", "by": "column", "column": "difficulty", "pacing": "none"},
        {"name": "margin", "source": "implicit", "keep": 1.0, "refresh": 3},
        {"name": "token_budget", "tokens": 160},
    ],
    ids=lambda other: other["name"],
)
def test_beside_other_methods_an_epoch_is_a_pass_as_well(make_trainer, other):
    trainer = make_trainer("dpo", dataset=marked(), num_train_epochs=3, max_steps=-1, per_device_train_batch_size=4)
    first = create_method("filtered_dpo", reward=even_is_good, start_epoch=1, max_new_tokens=4)
    witness = tiny.Witness()
    trainer.add_callback(SelectionCallback(trainer, [first, create_method(**other), witness]))
    trainer.train()
    ids = [i for step in witness.ids for i in step]
    assert sorted(ids[:40]) == list(range(40))
    assert sorted(ids[40:60]) == sorted(ids[60:80]) == list(range(0, 40, 2))
    # Beside what the last step is filled up with.
    assert len(ids) - 80 < len(witness.ids[-1])
    assert trainer.state.global_step < trainer.state.max_steps


def test_steps_that_are_asked_for_are_made(make_trainer):
    trainer = make_trainer("dpo", dataset=marked(), max_steps=12, per_device_train_batch_size=4)
    witness = tiny.attach(trainer, "filtered_dpo", reward=even_is_good, max_new_tokens=4)
    trainer.train()
    ids = [i for step in witness.ids for i in step]
    assert trainer.state.global_step == 12
    assert sorted(ids[:20]) == sorted(ids[20:40]) == list(range(0, 40, 2))
    assert trainer.selection.costs.counts["generated_responses"] == 40 + 20 + 20


def counted(callback):
    """Counts how often the run generates, with the seeds of the draws."""
    seeds, generate = [], callback.run.generate

    def counting(prompts, *, seed, **how):
        seeds.append(seed)
        return generate(prompts, seed=seed, **how)

    callback.run.generate = counting
    return seeds


def test_a_plan_that_is_asked_for_twice_is_sampled_for_once(make_trainer, monkeypatch):
    from dsel_trl.methods.preference import filtered_dpo

    reads, prompts_of = [], filtered_dpo.prompts_of
    monkeypatch.setattr(filtered_dpo, "prompts_of", lambda dataset: reads.append(1) or prompts_of(dataset))
    callback = SelectionCallback(make_trainer("dpo", dataset=marked()), "filtered_dpo", reward=even_is_good)
    (method,), run, seeds = callback.methods.methods, callback.run, counted(callback)
    method.max_new_tokens = 4
    masks = []
    run.arguments.num_train_epochs, run.arguments.max_steps = 2, -1
    for run.passes_begun in (1, 1, 2, 2, 3):
        masks += [callback.methods.kept(run).copy(), method.select(run).copy()]
    assert len(seeds) == len(set(seeds)) == 2
    for mask in masks:
        assert np.flatnonzero(mask).tolist() == list(range(0, 40, 2))
    assert len(reads) == 2, "the prompts of the whole dataset were read for every pair"


def test_a_second_training_filters_all_pairs_again(make_trainer):
    trainer = make_trainer("dpo", dataset=marked(), max_steps=1)
    rewards, scored = [lambda prompts, responses: [0.0] * len(responses), even_is_good], []

    def all_good_then_even(prompts, responses):
        scored.extend(responses)
        # The samples of all pairs and their chosen responses: what one training asks for.
        return rewards[len(scored) > 2 * 40](prompts, responses)

    callback = SelectionCallback(trainer, "filtered_dpo", reward=all_good_then_even, threshold=0.5, max_new_tokens=4)
    (method,) = callback.methods.methods
    trainer.train()
    assert method.state_dict()["left"].all()
    method.threshold = 0.0
    trainer.train()
    assert np.flatnonzero(method.state_dict()["left"]).tolist() == list(range(0, 40, 2))
    assert len(scored) == 4 * 40


def test_filtered_dpo_needs_one_reward():
    for parameters in ({}, {"reward": even_is_good, "reward_model": "x"}):
        with pytest.raises(ValueError, match="give one of them"):
            create_method("filtered_dpo", **parameters)
