"""EL2N in a run: what is averaged, and when it is read."""

import numpy as np
import pytest
import torch

from dsel_trl import create_method
from tests import tiny


@pytest.fixture(params=["sft", "dpo"])
def kind(request):
    return request.param


@pytest.mark.parametrize("window", [1.0, 0.5])
def test_the_mean_over_the_visits_within_the_window(make_trainer, kind, window):
    trainer = make_trainer(kind, dataset=tiny.DATASETS[kind](6), num_train_epochs=4)
    witness = tiny.attach(trainer, "el2n", action="curriculum", window=window)
    trainer.train()
    ledger = trainer.selection.ledger
    steps = witness.steps[: round(window * len(witness.steps))]
    for example in range(6):
        values = [s.values["el2n_last"][np.asarray(s.ids) == example] for s in steps]
        values = np.concatenate(values)
        assert ledger["el2n_visits"][example] == len(values) == 4 * window
        np.testing.assert_allclose(ledger["el2n"][example], values.mean(), rtol=1e-5)
    assert all(np.isnan(s.values["el2n_last"]).all() for s in witness.steps[len(steps) :])


def test_a_sequence_is_as_far_as_its_logits_say(make_trainer):
    trainer = make_trainer("sft", dataset=tiny.completions(4), max_steps=1, per_device_train_batch_size=4)
    witness = tiny.attach(trainer, "el2n", action="weight")
    model, expected = trainer.model, {}
    model.eval()
    for index in range(4):
        batch = trainer.selection.run.rows.collate(np.array([index]))
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[0, :-1]
        labels = batch["labels"][0, 1:]
        at = labels != -100
        onehot = torch.nn.functional.one_hot(labels[at], logits.shape[-1])
        expected[index] = (logits[at].softmax(-1) - onehot).norm(dim=-1).mean().item()
    trainer.train()
    (step,) = witness.steps
    np.testing.assert_allclose(step.values["el2n_last"], [expected[i] for i in step.ids], rtol=1e-5)


def test_what_a_trainer_cannot_give_is_refused(make_trainer):
    trainer = make_trainer("sft")
    tiny.attach(trainer, "el2n", form="pair")
    with pytest.raises(ValueError, match="form='pair' is of preference pairs"):
        trainer.train()
    with pytest.raises(ValueError, match="window=0 is not a number"):
        create_method("el2n", window=0)
    with pytest.raises(ValueError, match=r"window=0\.5 is not read with action='weight'"):
        create_method("el2n", window=0.5, action="weight")
