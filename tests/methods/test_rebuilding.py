"""Methods that build their dataset: curry_dpo, reward_augmented, inco_dpo; and what a resume finds of it."""

import numpy as np
import pytest
from datasets import Dataset

from dsel_trl import SelectionCallback, create_method
from tests import tiny


def words(prompts, responses):
    """More words, more reward."""
    return [float(len(response.split())) for response in responses]


def several(size=12):
    """Prompts with four scored responses; the last one has two of equal score only."""
    rng = np.random.default_rng(4)
    rows = []
    for pair in tiny.preferences().select(range(size)):
        texts = [pair["chosen"], pair["rejected"], " w1 w2", " w3"]
        rows.append({**pair, "responses": texts, "scores": rng.normal(size=4).tolist()})
    rows[-1] |= {"responses": [" w1", " w2"], "scores": [1.0, 1.0]}
    return Dataset.from_list(rows)


# ---- curry_dpo ----


def test_pairs_of_several_responses_come_in_stages(make_trainer):
    data = several()
    trainer = make_trainer("dpo", dataset=data, num_train_epochs=1)
    witness = tiny.attach(trainer, "curry_dpo", responses_column="responses")
    trainer.train()
    built = trainer.train_dataset
    assert len(built) == 33
    ids = [i for step in witness.ids for i in step]
    assert sorted(ids) == list(range(33))
    assert [built["stage"][i] for i in ids] == [0] * 11 + [1] * 11 + [2] * 11
    assert ids != sorted(ids)
    margins = np.array(built["score_chosen"]) - np.array(built["score_rejected"])
    for prompt in range(11):
        own = [i for i in range(33) if built["prompt"][i] == data["prompt"][prompt]]
        assert margins[own].tolist() == sorted(margins[own], reverse=True)
        best = data["responses"][prompt][int(np.argmax(data["scores"][prompt]))]
        assert {built["chosen"][i] for i in own} == {best + "<eos>"}
    trainer.selection.detach()
    assert trainer.train_dataset.column_names != built.column_names


def test_one_pair_per_row_is_sorted_by_margin(make_trainer):
    trainer = make_trainer("dpo")
    witness = tiny.attach(trainer, "curry_dpo", stages=2)
    trainer.train()
    margins = np.array(tiny.preferences()["score_chosen"]) - np.array(tiny.preferences()["score_rejected"])
    good = np.flatnonzero(margins > 0)
    ids = np.array([i for step in witness.ids for i in step])
    assert sorted(ids) == good.tolist()
    half = (len(good) + 1) // 2
    assert margins[ids[:half]].min() >= margins[ids[half:]].max()


def test_the_reference_follows_the_stages_and_a_resume(make_trainer, tmp_path):
    runs = []
    for resume in (None, str(tmp_path / "whole" / "checkpoint-10")):
        trainer = make_trainer(
            "dpo",
            dataset=several(),
            output_dir=tmp_path / "whole",
            save_strategy="steps",
            save_steps=5,
        )
        before = {name: value.clone() for name, value in trainer.ref_model.named_parameters()}
        witness = tiny.attach(trainer, "curry_dpo", responses_column="responses", refresh_reference=True)
        trainer.train(resume_from_checkpoint=resume)
        assert any(not before[name].equal(value) for name, value in trainer.ref_model.named_parameters())
        runs.append((tiny.Trace.of(trainer, witness), dict(trainer.ref_model.named_parameters())))
    runs[1][0].assert_ends_as(runs[0][0])
    tiny.assert_same_weights(runs[1][1], runs[0][1])


def test_each_stage_has_a_schedule_and_a_reference_of_its_own(make_trainer, tmp_path):
    """At the defaults: twelve steps of the stages, in each of which the rate falls from its start; resumed alike."""
    rates, config = {}, {"output_dir": tmp_path / "run", "save_strategy": "steps", "save_steps": 4, "logging_steps": 1}
    config |= {"lr_scheduler_type": "linear", "warmup_steps": 0, "learning_rate": 1e-3, "num_train_epochs": 1}
    for resume in (None, str(tmp_path / "run" / "checkpoint-4")):
        trainer = make_trainer("dpo", dataset=several(), per_device_train_batch_size=3, max_steps=-1, **config)
        before = {name: value.clone() for name, value in trainer.ref_model.named_parameters()}
        witness = tiny.attach(trainer, "curry_dpo", responses_column="responses")
        trainer.train(resume_from_checkpoint=resume)
        logged = [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]
        rates[resume is None] = logged, tiny.Trace.of(trainer, witness)
        assert any(not before[name].equal(value) for name, value in trainer.ref_model.named_parameters())
    # 33 pairs in 11 steps; the stages begin with the steps 0, 4 and 8.
    np.testing.assert_allclose(
        rates[True][0], [1e-3 * left / 4 for left in (4, 3, 2, 1) * 2] + [1e-3, 2e-3 / 3, 1e-3 / 3]
    )
    assert rates[False][0] == rates[True][0]
    rates[False][1].assert_ends_as(rates[True][1])


def test_a_reference_that_cannot_change_is_told_at_the_defaults(make_trainer):
    trainer = make_trainer("dpo", lora=True, max_steps=1)
    tiny.attach(trainer, "curry_dpo")
    trainer.train()
    assert any("the reference stays as it is" in note for note in trainer.selection.metrics_window.notes.values())


def test_a_schedule_that_cannot_begin_anew_is_refused(make_trainer):
    trainer = make_trainer(
        "dpo", lr_scheduler_type="reduce_lr_on_plateau", eval_dataset=tiny.preferences(4), eval_strategy="steps"
    )
    tiny.attach(trainer, "curry_dpo")
    with pytest.raises(ValueError, match='schedule="run"'):
        trainer.train()


@pytest.mark.parametrize("config", [{"precompute_ref_log_probs": True}, {"lora": True}], ids=["precomputed", "lora"])
def test_a_reference_that_cannot_change_is_refused(make_trainer, config):
    trainer = make_trainer("dpo", **config)
    SelectionCallback(trainer, "curry_dpo", refresh_reference=True)
    with pytest.raises(ValueError, match="refresh_reference"):
        trainer.train()


# ---- reward_augmented ----


def test_each_pair_becomes_two_conditioned_ones(make_trainer):
    data = tiny.preferences()
    evaluation = {"eval_dataset": tiny.preferences(6, seed=7), "eval_strategy": "steps", "eval_steps": 2}
    trainer = make_trainer("dpo", max_steps=2, **evaluation)
    callback = SelectionCallback(trainer, "reward_augmented", template="w1 {g}")
    trainer.train()
    built = trainer.train_dataset
    good = [row for row in data if row["score_chosen"] > row["score_rejected"]]
    assert len(built) == 2 * len(good)
    for number, row in enumerate(good):
        first, second = built[number], built[number + len(good)]
        assert first["prompt"] == f"w1 {row['score_chosen']}\n\n{row['prompt']}"
        assert second["prompt"] == f"w1 {row['score_rejected']}\n\n{row['prompt']}"
        assert (first["chosen"], first["rejected"]) == (row["chosen"] + "<eos>", row["rejected"] + "<eos>")
        assert (second["chosen"], second["rejected"]) == (row["rejected"] + "<eos>", row["chosen"] + "<eos>")
    best = max(built["goal"])
    assert all(prompt.startswith(f"w1 {best}\n\n") for prompt in trainer.eval_dataset["prompt"])
    callback.detach()
    assert not trainer.eval_dataset["prompt"][0].startswith("w1 0")
    assert len(trainer.train_dataset) == 40


def test_half_keeps_the_number_of_rows_and_precomputes_the_reference(make_trainer):
    good = sum(row["score_chosen"] > row["score_rejected"] for row in tiny.preferences())
    trainer = make_trainer("dpo", max_steps=1, lora=True, precompute_ref_log_probs=True)
    SelectionCallback(trainer, "reward_augmented", half=True, reward=words)
    trainer.train()
    assert len(trainer.train_dataset) == 2 * (len(trainer.train_dataset) // 2)
    assert np.isfinite(trainer.train_dataset["ref_chosen_logps"]).all()
    assert len(trainer.train_dataset) <= good + 10


def test_a_policy_that_has_learned_scores_its_pairs_itself(make_trainer):
    trainer = make_trainer("dpo", max_steps=1, learning_rate=0.0)
    tiny.stir(trainer, scale=0.1)
    tiny.attach(trainer, "reward_augmented", implicit=True)
    margins = trainer.selection.run.passes.measure(lambda batch: batch.log_ratio_margin)
    trainer.train()
    goals = np.array(trainer.train_dataset["goal"])
    # A pair whose two sides have one place of the scale after rounding is left out, as one of the wrong order is.
    assert abs(len(goals) - 2 * (margins > 0).sum()) <= 4
    assert goals.min() >= 1
    assert goals.max() <= 10
    assert len(set(goals.tolist())) > 10
    first = len(goals) // 2
    assert (goals[:first] > goals[first:]).all()
    untrained = make_trainer("dpo", max_steps=1)
    SelectionCallback(untrained, "reward_augmented", implicit=True)
    with pytest.raises(ValueError, match="here it is its reference"):
        untrained.train()


ATTRIBUTES = {"w5": ["help_chosen", "help_rejected"], "w6": ["words_chosen", "words_rejected"]}


def rated(size=40, seed=0):
    data, rng = tiny.preferences(size, seed=seed), np.random.default_rng(seed)
    for name in (name for sides in ATTRIBUTES.values() for name in sides):
        data = data.add_column(name, rng.integers(1, 5, size=size))
    return data


def test_several_scores_are_one_goal(make_trainer):
    data, evaluation = rated(), {"eval_dataset": rated(6, seed=7), "eval_strategy": "steps", "eval_steps": 1}
    trainer = make_trainer("dpo", dataset=data, max_steps=1, **evaluation)
    SelectionCallback(trainer, "reward_augmented", template="w1 {g}", attributes=ATTRIBUTES)
    trainer.train()
    built = trainer.train_dataset
    chosen, rejected = (np.array([data[sides[i]] for sides in ATTRIBUTES.values()]).T for i in (0, 1))
    different = (chosen != rejected).any(axis=1)
    good = np.flatnonzero((chosen.mean(axis=1) >= rejected.mean(axis=1)) & different)
    assert 5 < len(good) < 35
    assert len(built) == 2 * len(good)
    for number, i in enumerate(good.tolist()):
        row, first, second = data[i], built[number], built[number + len(good)]
        assert first["prompt"] == f"w1 w5 {chosen[i, 0]}, w6 {chosen[i, 1]}\n\n{row['prompt']}"
        assert second["prompt"] == f"w1 w5 {rejected[i, 0]}, w6 {rejected[i, 1]}\n\n{row['prompt']}"
        assert first["chosen"] == second["rejected"] == row["chosen"] + "<eos>"
        assert second["goal"] == {"w5": rejected[i, 0], "w6": rejected[i, 1]}
        assert (second["help_chosen"], second["help_rejected"]) == (row["help_rejected"], row["help_chosen"])
    best = {name: max(goal[name] for goal in built["goal"]) for name in ATTRIBUTES}
    wanted = f"w1 w5 {best['w5']:g}, w6 {best['w6']:g}\n\n"
    assert all(prompt.startswith(wanted) for prompt in trainer.eval_dataset["prompt"])


def test_what_is_wished_of_attributes_is_said_by_their_names(make_trainer):
    trainer = make_trainer("dpo", dataset=rated(), max_steps=1, eval_dataset=rated(6, seed=7))
    SelectionCallback(trainer, "reward_augmented", attributes=ATTRIBUTES, best={"w5": 4, "w6": 1})
    trainer.train()
    assert all("w5 4, w6 1." in prompt for prompt in trainer.eval_dataset["prompt"])
    for wrong in (
        {"attributes": ATTRIBUTES, "best": 4.0},
        {"attributes": ATTRIBUTES, "best": {"w5": 4.0}},
        {"best": {"w5": 4.0}},
    ):
        with pytest.raises(ValueError, match="best="):
            create_method("reward_augmented", **wrong)
    for wrong in ({}, {"w5": ["help_chosen"]}, {"w5": "help_chosen"}):
        with pytest.raises(ValueError, match="attributes"):
            create_method("reward_augmented", attributes=wrong)
    with pytest.raises(ValueError, match="'no_such'"):
        SelectionCallback(make_trainer("dpo"), "reward_augmented", attributes={"w5": ["score_chosen", "no_such"]})


def test_goals_of_a_stream_are_those_of_its_rows():
    from dsel_trl.data.build.reward_augmented import build

    rows = build(rated(), attributes=ATTRIBUTES)
    stream = list(build(rated().to_iterable_dataset(), attributes=ATTRIBUTES))
    assert stream[::2] == list(rows)[: len(rows) // 2]
    assert stream[1::2] == list(rows)[len(rows) // 2 :]


def test_a_goal_that_would_be_cut_off_is_refused(make_trainer):
    for mode, refused in (("keep_start", False), ("keep_end", True)):
        trainer = make_trainer("dpo", max_steps=1, max_length=16, truncation_mode=mode)
        SelectionCallback(trainer, "reward_augmented", template="w1 {g}")
        if refused:
            with pytest.raises(ValueError, match=r"cuts the goal off \d+ of \d+ pairs"):
                trainer.train()
        else:
            trainer.train()


# ---- inco_dpo ----


def inco(**more):
    settings = {
        "reward": words,
        "samples": 2,
        "continuations": 2,
        "max_new_tokens": 6,
        "ratio": 0.5,
        "unfinished": "keep",
    }
    return create_method("inco_dpo", **{**settings, **more})


def test_pairs_of_continuations(make_trainer):
    trainer = make_trainer("dpo", num_train_epochs=1, max_length=128)
    witness = tiny.attach(trainer, inco())
    trainer.train()
    built = trainer.train_dataset
    assert len(built) == 40
    assert sum(len(ids) for ids in witness.ids) == 40
    new = [row for row in built if row["synthesized"]]
    assert len(new) > 20
    for row in new:
        assert row["score_chosen"] > row["score_rejected"]
        assert row["score_chosen"] == len(row["chosen"].removesuffix("<eos>").split())
    assert any(row["prefix_share"] > 0 for row in new)


def test_each_epoch_is_built_of_the_policy_as_it_is_and_resumes(make_trainer, tmp_path):
    runs = {}
    config = {"num_train_epochs": 3, "per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 5}
    for name, resume in {"whole": None, "inside": 15, "border": 10}.items():
        folder = tmp_path / "whole"
        trainer = make_trainer("dpo", output_dir=folder, max_length=128, **config)
        witness = tiny.attach(trainer, inco())
        trainer.train(resume_from_checkpoint=resume and str(folder / f"checkpoint-{resume}"))
        runs[name] = tiny.Trace.of(trainer, witness), trainer.train_dataset["chosen"][:]
        if resume is None:
            files = sorted(path.name for path in (folder / "selection").glob("rebuilt-*"))
            assert files == [f"rebuilt-inco_dpo-{epoch}.parquet" for epoch in range(3)]
            epochs = [Dataset.from_parquet(str(folder / "selection" / file))["chosen"][:] for file in files]
            assert epochs[0] != epochs[1] != epochs[2]
            ends = [text.removesuffix("<eos>") for text in epochs[2]]
            assert ends == [text.removesuffix("<eos>") for text in runs[name][1]]
    for name in ("inside", "border"):
        runs[name][0].assert_ends_as(runs["whole"][0])
        assert runs[name][1] == runs["whole"][1]


@pytest.mark.parametrize("unfinished", ["drop", "keep"])
def test_what_the_cap_has_cut_off_is_not_trained_as_if_it_ended(make_trainer, unfinished):
    trainer = make_trainer("dpo", max_steps=1, max_length=128)
    # Any of some words ends a response here: about half of them end before the cap.
    ends = list(range(1, 20))
    trainer.model.generation_config.eos_token_id = ends
    tiny.attach(trainer, inco(max_new_tokens=8, continuations=0, samples=8, unfinished=unfinished))
    trainer.train()
    cut = trainer.selection.costs.counts["cut_responses"]
    assert 0 < cut < 320
    whole = []
    for row in trainer.train_dataset:
        if row["synthesized"]:
            tokens = trainer._tokenizer(row["chosen"].removesuffix("<eos>"))["input_ids"]
            whole.append(len(tokens) < 8 or tokens[-1] in ends)
    assert len(whole) > 5
    assert all(whole) == (unfinished == "drop")


def test_once_is_once(make_trainer, tmp_path):
    trainer = make_trainer("dpo", num_train_epochs=2, max_length=128)
    SelectionCallback(trainer, inco(refresh="never", balance=0.05))
    trainer.train()
    assert len(list((tmp_path / "out" / "selection").glob("rebuilt-*"))) == 1


def test_without_a_reward_it_is_refused():
    with pytest.raises(ValueError, match="give one of them"):
        create_method("inco_dpo")
