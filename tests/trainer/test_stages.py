"""What is known of a run belongs to that run: its dataset, its loader, its attempt."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from dsel_trl import SelectionCallback
from tests import live, tiny


def weighted(size, seed, low):
    rows = tiny.preferences(size, seed).to_list()
    for i, row in enumerate(rows):
        row["weight"] = low + i / size
    return Dataset.from_list(rows)


@pytest.mark.parametrize("sizes", [(16, 16), (16, 24), (24, 12)])
def test_a_second_dataset_brings_its_own_weights(make_trainer, sizes):
    first, second = (weighted(size, seed, low) for size, seed, low in zip(sizes, (0, 1), (0.1, 5.0), strict=True))
    prepared = make_trainer("dpo", dataset=second).train_dataset
    trainer = make_trainer("dpo", dataset=first, learning_rate=0.0)
    witness = tiny.attach(trainer, "weight_column", normalize="none")
    trainer.train()
    trainer.train_dataset = prepared
    trainer.train()
    assert len(trainer.selection.ledger) == sizes[1]
    for step in witness.steps:
        np.testing.assert_allclose(step.values["weight"], 5.0 + step.ids / sizes[1], rtol=1e-5)
    assert trainer.selection.ledger.visits.tolist() == [1] * sizes[1]


def test_a_second_dataset_without_the_column_is_refused(make_trainer):
    trainer = make_trainer("dpo", dataset=weighted(16, 0, 1.0), max_steps=1)
    trainer.add_callback(SelectionCallback(trainer, "weight_column"))
    trainer.train()
    trainer.train_dataset = make_trainer("dpo", dataset=weighted(16, 1, 1.0).remove_columns("weight")).train_dataset
    with pytest.raises(ValueError, match="'weight_column' reads the column 'weight', which the dataset does not have"):
        trainer.train()


@pytest.mark.parametrize("method", ["margin", "curriculum", "random"])
def test_a_second_run_chooses_as_if_it_were_the_first(make_trainer, method):
    parameters = {
        "margin": {"refresh": 2, "keep": 0.5},
        "curriculum": {"by": "column", "column": "difficulty"},
        "random": {},
    }[method]
    trainer = make_trainer("dpo", dataset=weighted(24, 0, 1.0), learning_rate=0.0)
    witness = tiny.attach(trainer, method, **parameters)
    trainer.train()
    first = witness.ids
    trainer.train()
    assert witness.ids == first


class AsksForTheLength(TrainerCallback):
    """Makes loaders in the middle of a run, as callbacks that only want a number do, and looks into one."""

    def __init__(self, look=False):
        self.trainer, self.look = None, look

    def on_step_begin(self, args, state, control, **kwargs):
        loader = self.trainer.get_train_dataloader()
        assert len(loader) > 0
        if self.look:
            next(iter(loader))


@pytest.mark.parametrize("look", [False, True])
@pytest.mark.parametrize("method", ["live_order", "live_half", "pick_longest"])
def test_a_loader_of_a_callback_changes_nothing(make_trainer, method, look):
    ids = []
    for asks in (False, True):
        trainer = make_trainer("dpo", num_train_epochs=2)
        witness = tiny.attach(trainer, live.METHODS[method]())
        if asks:
            callback = AsksForTheLength(look)
            callback.trainer = trainer
            trainer.add_callback(callback)
        trainer.train()
        ids.append(witness.ids)
    assert ids[0] == ids[1]


def test_a_loader_of_a_callback_changes_no_resume(make_trainer, tmp_path):
    traces = []
    for resume in (False, True):
        trainer = make_trainer(
            "dpo", num_train_epochs=2, save_strategy="steps", save_steps=7, output_dir=tmp_path / "run"
        )
        witness = tiny.attach(trainer, live.METHODS["live_order"]())
        callback = AsksForTheLength()
        callback.trainer = trainer
        trainer.add_callback(callback)
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-7") if resume else None)
        traces.append(tiny.Trace.of(trainer, witness))
    traces[1].assert_ends_as(traces[0])


class TooLarge(TrainerCallback):
    """Runs out of memory, once, in the middle of a first attempt."""

    def __init__(self):
        self.failed = False

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2 and not self.failed:
            self.failed = True
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")


def test_a_failed_attempt_is_forgotten_and_the_found_size_resumed(make_trainer, tmp_path):
    config = {
        "auto_find_batch_size": True,
        "per_device_train_batch_size": 4,
        "save_strategy": "steps",
        "save_steps": 5,
        "output_dir": tmp_path / "run",
    }
    trainer = make_trainer("dpo", dataset=weighted(24, 0, 1.0), **config)
    witness = tiny.attach(trainer, "margin", refresh=2, keep=0.75)
    trainer.add_callback(TooLarge())
    trainer.train()
    size = trainer._train_batch_size
    assert size < 4
    assert trainer.selection.ledger.visits.sum() == trainer.state.global_step * size
    assert sum(map(len, witness.ids)) == trainer.state.global_step * size
    whole = tiny.Trace.of(trainer, witness)

    resumed = make_trainer("dpo", dataset=weighted(24, 0, 1.0), **config)
    again = tiny.attach(resumed, "margin", refresh=2, keep=0.75)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-5"))
    assert resumed._train_batch_size == size
    assert again.ids == whole.ids[5:]
