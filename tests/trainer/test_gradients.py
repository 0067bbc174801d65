"""Gradients beside the training: of a target, in the mode and the memory that they should have."""

import numpy as np
import pytest
import torch

from dsel_trl import SelectionCallback
from dsel_trl.trainer.forwards import evaluating
from tests import tiny


def calls_of(trainer, found):
    """Counts the runs of the first block's feed-forward part."""
    block = trainer.model.model.layers[0].mlp
    return block.register_forward_pre_hook(lambda module, args: found.append(module.training))


def target_gradient(model, folder, **config):
    trainer = tiny.make_trainer("sft", model, folder, max_steps=1, **config)
    SelectionCallback(trainer, "uniform")
    run, seen = trainer.selection.run, []
    if trainer.args.gradient_checkpointing:
        # The trainer does so when training begins.
        trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
    trainer.model.train()
    handle = calls_of(trainer, seen)
    gradient = run.gradients.of(run.rows, np.arange(2), layers="linear")
    handle.remove()
    return trainer, gradient, seen


def test_a_target_keeps_no_activations_where_training_keeps_none(model, tmp_path):
    _, plain, once = target_gradient(model, tmp_path / "a", gradient_checkpointing=False)
    trainer, checkpointed, twice = target_gradient(model, tmp_path / "b", gradient_checkpointing=True)
    # Run again on the way back instead of kept; nothing in the layers is in training mode all the same.
    assert len(once) == 1
    assert len(twice) == 2
    assert not any(once + twice)
    assert all(module.training for module in trainer.model.modules())
    for name, value in plain.items():
        torch.testing.assert_close(checkpointed[name], value)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_what_drops_at_random_is_in_evaluation_mode(model, tmp_path, dropout):
    trainer = tiny.make_trainer("sft", model, tmp_path, gradient_checkpointing=True)
    trainer.model.config.attention_dropout = dropout
    if trainer.args.gradient_checkpointing:
        # The trainer does so when training begins.
        trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
    trainer.model.train()
    with evaluating(trainer):
        training = [name for name, module in trainer.model.named_modules() if module.training]
        assert bool(training) == (dropout == 0)
        assert not any("self_attn" in name for name in training)
    assert trainer.model.training
