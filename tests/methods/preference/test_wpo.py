"""WPO through the gate: TRL's own weighting where the cap is off, and never above the cap where it is on."""

import pytest
import torch

from dsel_trl import SelectionCallback, create_method
from tests import tiny, weighted
from tests.methods import live

STEP = {"max_steps": 1, "learning_rate": 0.0, "max_grad_norm": 0.0, "per_device_train_batch_size": 6}


def trls_own(make_trainer, **config):
    trainer = make_trainer("dpo", use_weighting=True, **STEP, **config)
    tiny.stir(trainer, scale=0.05)
    keep = weighted.KeepGradients()
    trainer.add_callback(keep)
    trainer.train()
    return keep.gradients


@pytest.mark.parametrize(
    "config", [{}, {"loss_type": "ipo"}, {"lora": True}, {"precompute_ref_log_probs": True}], ids=str
)
def test_without_a_cap_it_is_trls_weighting(make_trainer, config):
    trainer = make_trainer("dpo", **STEP, **config)
    gradient, _ = live.first_step(trainer, create_method("wpo", cap=None))
    expected = trls_own(make_trainer, **config)
    live.assert_same_gradient(gradient, expected, rtol=1e-4)


def test_the_cap_acts(make_trainer):
    _, method, capped, batches = live.one_step(make_trainer, "wpo", cap=1e-3)
    free = create_method("wpo", cap=None).score(batches[0])
    assert (free > 1e-3).any()
    assert torch.equal(method.score(batches[0]), free.clamp(max=1e-3))
    _, _, other, _ = live.one_step(make_trainer, "wpo", cap=None)
    with pytest.raises(AssertionError):
        live.assert_same_gradient(capped, other, rtol=1e-2)


def test_trls_weighting_and_ours_are_refused_together(make_trainer):
    trainer = make_trainer("dpo", use_weighting=True, max_steps=1)
    SelectionCallback(trainer, "wpo")
    with pytest.raises(ValueError, match="use_weighting"):
        trainer.train()
