"""The gradient behind the gate is the explicitly weighted sum of per-example gradients, for any of TRL's losses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dsel_trl.functional.dpo_losses import SEPARABLE_LOSSES
from dsel_trl.signals.gate import Gate, WeightAverage
from tests import tiny, weighted

ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d"]
TORCHRUN += ["--rdzv_endpoint=localhost:0"]
TOLERANCE = 1e-5
STEP = {
    "max_steps": 1,
    "learning_rate": 0.0,
    "weight_decay": 0.0,
    "max_grad_norm": 0.0,
    "per_device_train_batch_size": 3,
}
SMOOTHING = {"robust": 0.1, "exo_pair": 1e-3}
VARIANTS = {
    **{
        f"f_{name}": {"loss_type": [loss], "f_divergence_type": name, "f_alpha_divergence_coef": 0.5}
        for name, loss in (("forward_kl", "sigmoid"), ("js_divergence", "hinge"), ("alpha_divergence", "ipo"))
    },
    "wpo": {"use_weighting": True},
    "ld_dpo": {"ld_alpha": 0.4},
    "two_losses": {"loss_type": ["sigmoid", "bco_pair"], "loss_weights": [0.7, 0.3]},
    "beta": {"beta": 0.7, "loss_type": ["apo_zero"]},
    "truncated": {"max_length": 12},
}


def loss_config(loss_type):
    return {"loss_type": [loss_type], "label_smoothing": SMOOTHING.get(loss_type, 0.0)}


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("loss_type", SEPARABLE_LOSSES)
def test_every_dpo_loss(make_trainer, loss_type, lora):
    outcome = weighted.compare(make_trainer("dpo", lora=lora, **STEP, **loss_config(loss_type)))
    assert outcome.error < TOLERANCE


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_way_to_change_a_dpo_loss(make_trainer, variant):
    assert weighted.compare(make_trainer("dpo", **STEP, **VARIANTS[variant])).error < TOLERANCE


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "nca_pair"])
@pytest.mark.parametrize(
    "config",
    [
        {"gradient_checkpointing": True},
        {"precompute_ref_log_probs": True},
        {"gradient_checkpointing": True, "precompute_ref_log_probs": True},
    ],
    ids=["checkpointing", "precomputed", "both"],
)
def test_dpo_memory_savers(make_trainer, loss_type, lora, config):
    trainer = make_trainer("dpo", lora=lora, **{**STEP, **config}, **loss_config(loss_type))
    assert weighted.compare(trainer).error < TOLERANCE


@pytest.mark.parametrize("normalize", ["none", "mean1"])
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("kind", ["dpo", "sft"])
def test_normalisation_spans_the_optimizer_step(make_trainer, kind, steps, normalize):
    trainer = make_trainer(kind, gradient_accumulation_steps=steps, **STEP)
    assert weighted.compare(trainer, normalize=normalize).error < TOLERANCE


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("loss_type", ["nll", "dft"])
@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("sft", {}),
        ("lm", {}),
        ("sft", {"padding_free": True, "max_length": None}),
        ("lm", {"padding_free": True, "max_length": None}),
        ("sft", {"gradient_checkpointing": True}),
        ("sft", {"completion_only_loss": False}),
    ],
    ids=["completion", "text", "flat_completion", "flat_text", "checkpointing", "prompt_too"],
)
def test_every_sft_loss(make_trainer, kind, config, loss_type, lora):
    trainer = make_trainer(kind, lora=lora, **{**STEP, **config}, loss_type=loss_type)
    assert weighted.compare(trainer, normalize="mean1").error < TOLERANCE


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(("kind", "config"), [("sft", {}), ("lm", {"padding_free": True, "max_length": None})])
def test_sft_loss_in_chunks(make_trainer, kind, config, lora):
    """The default up to TRL 1.14, which later releases take for `"nll"`."""
    trainer = make_trainer(kind, lora=lora, **{**STEP, **config}, loss_type="chunked_nll")
    assert weighted.compare(trainer, normalize="mean1").error < TOLERANCE


def test_the_comparison_sees_a_wrong_weight(make_trainer):
    """The explicit gradient of other weights is far away: the tests above can fail."""
    trainer = make_trainer("dpo", **STEP)
    outcome = weighted.compare(trainer)
    swapped = weighted.WEIGHTS.copy()
    swapped[:] = weighted.WEIGHTS[::-1]
    other = weighted.compare(make_trainer("dpo", **STEP), weights=swapped)
    outcome.explicit = other.explicit
    assert outcome.error > 1e-2


def test_zero_weights_leave_no_gradient(make_trainer):
    gated, _, logs = weighted.one_step(make_trainer("dpo", **STEP), weights=0 * weighted.WEIGHTS, normalize="mean1")
    assert all(not gradient.any() for gradient in gated.values())
    assert logs["loss"] > 0


def test_negative_weights_turn_the_gradient(make_trainer):
    gated, _, _ = weighted.one_step(make_trainer("dpo", **STEP))
    turned, _, _ = weighted.one_step(make_trainer("dpo", **STEP), weights=-weighted.WEIGHTS)
    for name, gradient in gated.items():
        assert torch.equal(turned[name], -gradient), name


def test_two_processes(model, tmp_path):
    for kind, make_dataset in tiny.DATASETS.items():
        make_dataset().save_to_disk(tmp_path / kind)
    done = subprocess.run(
        [*TORCHRUN, "-m", "tests.distributed.gate", str(model), str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    errors = json.loads((tmp_path / "errors.json").read_text())
    assert len(errors) == 12
    assert max(errors.values()) < TOLERANCE, errors


# ---- The gate alone ----


def test_the_gate_is_the_identity_forward():
    values = torch.randn(3, 5)
    assert torch.equal(Gate()(values), values)


def test_weights_may_be_set_after_the_forward():
    gate, values = Gate(), torch.ones(2, 3, requires_grad=True)
    loss = gate(values).sum()
    gate.weights = torch.tensor([2.0, 0.0])
    loss.backward()
    assert values.grad.tolist() == [[2.0] * 3, [0.0] * 3]


def test_weights_per_token():
    gate, values = Gate(), torch.ones(2, 3, requires_grad=True)
    gate.weights = torch.arange(6.0).view(2, 3)
    gate(values).sum().backward()
    assert torch.equal(values.grad, gate.weights)


def test_a_row_weight_covers_all_further_dimensions():
    gate, values = Gate(), torch.ones(2, 3, 4, requires_grad=True)
    gate.weights = torch.tensor([1.0, 3.0])
    gate(values).sum().backward()
    assert torch.equal(values.grad, torch.tensor([1.0, 3.0]).view(2, 1, 1).expand(2, 3, 4))


@pytest.mark.parametrize("weights", [None, torch.ones(4)])
def test_no_weight_and_weight_one_change_no_bit(weights):
    plain, gate = torch.randn(4, 7), Gate()
    gated = plain.clone().requires_grad_()
    plain.requires_grad_()
    (plain.exp().sum(1) ** 0.5).mean().backward()
    gate.weights = weights
    (gate(gated).exp().sum(1) ** 0.5).mean().backward()
    assert torch.equal(plain.grad, gated.grad)


def test_half_precision_gradients_stay_half_precision():
    gate, values = Gate(), torch.ones(2, 3, dtype=torch.bfloat16, requires_grad=True)
    gate.weights = torch.tensor([0.5, 2.0])
    gate(values).sum().backward()
    assert values.grad.dtype == torch.bfloat16
    assert values.grad[:, 0].tolist() == [0.5, 2.0]


def test_the_average_is_one_after_scaling():
    average, weights = WeightAverage(), [torch.tensor([1.0, 2.0]), torch.tensor([6.0])]
    for part in weights:
        average.add(part)
    assert average.scale(average.total, average.count) == pytest.approx(1 / 3)
    average.reset()
    assert (average.total, average.count) == (0.0, 0)


@pytest.mark.parametrize(("total", "count"), [(5.0, 5), (0.0, 5), (-2.0, 5)])
def test_nothing_is_scaled_without_a_positive_mean(total, count):
    assert WeightAverage().scale(total, count) == 1.0
