"""A checkpoint continued with other batches: exactly, not at all, or with leave at the next epoch."""

import logging
from itertools import chain

import pytest
import torch

from dsel_trl import Method, SelectionCallback, create_method
from dsel_trl.commands.arguments import parse_arguments
from dsel_trl.trainer.batches import Batches
from tests import live, tiny

FOUR = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
TWO_BY_TWO = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
TWO = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}


@pytest.fixture
def run(make_trainer, tmp_path):
    """`run(folder, method, batches, resume=None, leave=False, **config)`: a trainer that has trained, its witness."""

    def make(folder, method, batches, resume=None, leave=False, size=16, **config):
        config = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 1, **batches, **config}
        config = {"lr_scheduler_type": "linear", "dataset": tiny.preferences(size), **config}
        trainer = make_trainer("dpo", output_dir=tmp_path / folder, **config)
        witness = tiny.Witness()
        if not isinstance(method, Method):
            method = create_method(method, **({"keep": 1.0} if method == "random" else {}))
        trainer.add_callback(SelectionCallback(trainer, [method, witness], resume_with_other_batches=leave))
        trainer.train(resume_from_checkpoint=None if resume is None else str(tmp_path / resume))
        return trainer, witness

    return make


@pytest.mark.parametrize("method", ["uniform", "random"])
@pytest.mark.parametrize(("before", "after"), [(FOUR, TWO_BY_TWO), (TWO_BY_TWO, FOUR)], ids=["4x1-2x2", "2x2-4x1"])
def test_as_many_examples_per_step_go_on_exactly(run, method, before, after):
    whole, all_steps = run("whole", method, before)
    again, steps = run("again", method, after, resume="whole/checkpoint-2")
    assert len(steps.ids) == 6
    assert steps.ids == all_steps.ids[2:]
    ours, theirs = tiny.weights_of(again), tiny.weights_of(whole)
    for name in theirs:
        assert torch.linalg.norm(ours[name] - theirs[name]) <= 1e-6 * torch.linalg.norm(theirs[name]), name
    assert again.selection.ledger.visits.tolist() == whole.selection.ledger.visits.tolist()


@pytest.mark.parametrize(
    ("method", "size", "before", "after", "reason"),
    [
        ("uniform", 16, FOUR, TWO, "4 examples per optimizer step .* 2 examples per optimizer step"),
        ("uniform", 19, FOUR, TWO_BY_TWO, "the last step of an epoch has 3 examples"),
        (live.LiveOrder(), 16, FOUR, TWO_BY_TWO, "'live_order' plans within an epoch"),
        ("dr_dpo", 16, FOUR, TWO_BY_TWO, "'dr_dpo' looks at a micro-batch as a whole"),
        ("token_budget", 16, FOUR, TWO_BY_TWO, "forms its batches for one shape"),
    ],
    ids=["product", "last-step", "live", "coupled", "batches"],
)
def test_what_cannot_be_exact_is_refused(run, method, size, before, after, reason):
    run("first", method, before, size=size, max_steps=2)
    with pytest.raises(ValueError, match=f"(?s){reason}.*resume_with_other_batches=True"):
        run("again", method, after, resume="first/checkpoint-1", size=size, max_steps=2)


@pytest.mark.parametrize("method", ["uniform", "random", "token_budget"])
def test_with_leave_the_next_epoch_follows(run, caplog, method):
    run("first", method, FOUR)
    with caplog.at_level(logging.WARNING):
        again, steps = run("again", method, TWO, resume="first/checkpoint-1", leave=True)
    assert "of epoch 1 are left out" in caplog.text
    assert "4 examples per optimizer step" in caplog.text
    assert "2 examples per optimizer step" in caplog.text
    assert again.state.global_step == again.state.max_steps
    assert again.state.epoch == 2.0
    if method == "token_budget":
        assert set(chain(*steps.ids)) == set(range(16))
    else:
        assert "The last 75.0% of epoch 1 are left out, 12 of 16 examples" in caplog.text
        assert len(steps.ids) == 8
        assert sorted(chain(*steps.ids)) == list(range(16))
        assert again.selection.ledger.visits.sum() == 20
        # The second half of a linear schedule.
        rates = [row["learning_rate"] for row in again.state.log_history if "loss" in row][1:]
        assert rates == pytest.approx([5e-3 * (8 - i) / 16 for i in range(8)])
        # What it saves goes on exactly.
        _, rest = run("third", method, TWO, resume="again/checkpoint-11")
        assert rest.ids == steps.ids[3:]


def test_nothing_left_and_old_checkpoints_are_refused(run):
    run("first", "uniform", TWO, num_train_epochs=1)
    with pytest.raises(ValueError, match="nothing is left to train"):
        run("again", "uniform", FOUR, resume="first/checkpoint-1", leave=True, num_train_epochs=1)
    with pytest.raises(ValueError, match=r"checkpoint-8 in .* would pass for newer"):
        run("first", "uniform", FOUR, resume="first/checkpoint-1", leave=True)


def test_keys_of_the_yaml_file(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "model_name_or_path: demo\ndataset_name: demo\noutput_dir: out\nuse_cpu: true\n"
        "resume_with_other_batches: true\nresume_across_versions: true\n"
    )
    told = parse_arguments("dpo", ["--config", str(tmp_path / "run.yaml")])
    assert told.resume_with_other_batches
    assert told.resume_across_versions


def test_processes_that_fill_up_a_short_step():
    assert Batches(2, 1, 1).shares_evenly(1)
    assert not Batches(1, 2, 1).shares_evenly(1)
    assert Batches(1, 2, 2).shares_evenly(2)
    assert not Batches(2, 1, 2).shares_evenly(3)
