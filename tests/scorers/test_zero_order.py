"""Gradients by forwards alone: against those of backward passes, and without a trace in the model."""

import numpy as np
import pytest
import torch

from dsel_trl.scorers.zero_order import Directions, block_parameters, zero_order_features
from tests import tiny


@pytest.mark.parametrize("kind", ["sft", "dpo"])
@pytest.mark.parametrize("lora", [False, True])
def test_features_are_the_gradients_along_shared_directions(make_trainer, kind, lora):
    trainer = make_trainer(kind, dataset=tiny.DATASETS[kind](6), lora=lora)
    tiny.attach(trainer, "uniform")
    tiny.stir(trainer)
    run, before = trainer.selection.run, tiny.weights_of(trainer)
    got = zero_order_features(run, 5, 2e-3)
    tiny.assert_same_weights(tiny.weights_of(trainer), before)

    parameters = block_parameters(trainer.model)
    drawn = []
    for q in range(5):
        generator = torch.Generator().manual_seed(run.stream_seed("zero_order/direction", q))
        drawn.append([torch.randn(p.shape, generator=generator) for p in parameters.values()])
    trainer.model.eval()
    for row in range(6):
        inputs = run.rows.collate(np.array([row]))
        logits = trainer.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
        mask = (inputs["completion_mask"][:, 1:] if kind == "dpo" else inputs["labels"][:, 1:] != -100).bool()
        logps = logits.log_softmax(-1).gather(-1, inputs["input_ids"][:, 1:, None]).squeeze(-1) * mask
        sums = logps.sum(dim=1)
        loss = sums[1] - sums[0] if kind == "dpo" else -sums[0] / mask.sum()
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        expected = [sum((g * z).sum() for g, z in zip(gradients, along, strict=True)).item() for along in drawn]
        np.testing.assert_allclose(got[row], np.array(expected) / np.sqrt(5), rtol=0.01, atol=5e-3)


def test_a_failure_leaves_the_parameters_where_they_were(make_trainer):
    trainer = make_trainer("sft")
    before = tiny.weights_of(trainer)
    moved = Directions(block_parameters(trainer.model), lambda q: q)
    changed = {}

    def cut_off():
        with moved.in_place() as move:
            move(0, 1e-3)
            changed.update(tiny.weights_of(trainer))
            raise RuntimeError("cut off")

    with pytest.raises(RuntimeError, match="cut off"):
        cut_off()
    tiny.assert_same_weights(tiny.weights_of(trainer), before)
    names = {name for name in before if (changed[name] != before[name]).any()}
    assert names == set(block_parameters(trainer.model))
    assert all(".layers.1." in name for name in names)


def test_a_block_that_is_not_there_is_an_error(make_trainer):
    model = make_trainer("sft").model
    with pytest.raises(ValueError, match="block=2: the model has 2 decoder blocks"):
        block_parameters(model, 2)
    for parameter in block_parameters(model, 0).values():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="block=-2: no parameter of that block is trained"):
        block_parameters(model, -2)
