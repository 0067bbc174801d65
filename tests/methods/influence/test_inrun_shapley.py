"""In-run data Shapley in a run: values that add up to what the target's loss has lost, and what is refused."""

import numpy as np
import pytest
import torch

from dsel_trl import SelectionCallback, create_method
from dsel_trl.bases.influence import length
from tests import tiny

STEP = {
    "max_steps": 1,
    "gradient_accumulation_steps": 2,
    "per_device_train_batch_size": 3,
    "optim": "sgd",
    "max_grad_norm": 0.5,
}


def value(trainer, rows):
    """The target's mean loss."""
    run = trainer.selection.run
    return float(run.passes.measure(lambda batch: batch.loss, rows=rows).astype(np.float64).mean())


@pytest.mark.parametrize(("kind", "rate"), [("dpo", 0.02), ("sft", 0.3)])
def test_the_values_of_a_step_are_what_the_target_has_gained(model, tmp_path, kind, rate):
    target = tiny.DATASETS[kind](5, seed=1)
    errors = []
    for order in (1, 2):
        config = {**STEP, "learning_rate": rate}
        trainer = tiny.make_trainer(kind, model, tmp_path / str(order), **config)
        tiny.stir(trainer)
        # All parameters but those of the fused head, which stays where it is.
        trainer.model.lm_head.requires_grad_(False)
        method = create_method("inrun_shapley", target=target, layers="all", taylor=order)
        witness = tiny.Witness()
        trainer.add_callback(SelectionCallback(trainer, [method, witness]))
        rows = method.target_rows(trainer.selection.run)
        before = value(trainer, rows)
        trainer.train()
        gained = before - value(trainer, rows)
        found = trainer.selection.ledger["inrun_shapley"]
        (step,) = witness.steps
        assert np.isfinite(found[step.ids]).all()
        assert np.isnan(np.delete(found, step.ids)).all()
        assert step.clip_factor < 1
        assert step.learning_rate == rate
        errors.append(abs(found[step.ids].sum() - gained) / abs(gained))
    assert errors[0] < 0.5
    # With the curvature it is closer.
    assert errors[1] < 0.25 * errors[0]


def test_curvature_is_the_hessian_times_the_direction(model, tmp_path):
    trainer = tiny.make_trainer("sft", model, tmp_path, max_steps=1)
    # Of the fast attention a second derivative is not there.
    trainer.model.set_attn_implementation("eager")
    SelectionCallback(trainer, create_method("uniform"))
    gradients = trainer.selection.run.gradients
    parameters = gradients.parameters("last-1")
    generator = torch.Generator().manual_seed(0)
    direction = {name: torch.randn(p.shape, generator=generator) for name, p in parameters.items()}
    before = {name: p.detach().clone() for name, p in parameters.items()}
    rows = trainer.selection.run.rows
    ids = np.arange(4)
    found = gradients.curvature(direction, lambda: gradients.of(rows, ids, layers="last-1"))
    loss = gradients.score(rows.collate(ids), torch.arange(4), gradient=True).loss.mean()
    # Nor of the fused head: the logits of the same model have one.
    inputs = rows.collate(ids)
    logits = trainer.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), inputs["labels"][:, 1:], reduction="none"
    )
    same = (losses.sum(1) / (inputs["labels"][:, 1:] != -100).sum(1)).mean()
    torch.testing.assert_close(same, loss)
    first = torch.autograd.grad(same, list(parameters.values()), create_graph=True)
    along = sum((g * d).sum() for g, d in zip(first, direction.values(), strict=True))
    exact = torch.autograd.grad(along, list(parameters.values()))
    apart = sum(float((found[n] - e).square().sum()) for n, e in zip(parameters, exact, strict=True))
    assert apart**0.5 < 1e-3 * sum(float(e.square().sum()) for e in exact) ** 0.5
    assert all(torch.equal(parameters[name], value) for name, value in before.items())


def test_mean_and_sum(model, tmp_path):
    found = {}
    for how in ("sum", "mean"):
        config = {"dataset": tiny.preferences(12), "num_train_epochs": 2, "optim": "sgd"}
        trainer = tiny.make_trainer("dpo", model, tmp_path / how, **config)
        method = create_method("inrun_shapley", target=tiny.preferences(4, seed=1), keep=1.0, accumulate=how)
        trainer.add_callback(SelectionCallback(trainer, method))
        trainer.train()
        found[how] = trainer.selection.ledger["inrun_shapley"].copy()
        assert (trainer.selection.ledger["inrun_shapley_times"] == 2).all()
    np.testing.assert_allclose(found["mean"], found["sum"] / 2, rtol=1e-5)


@pytest.mark.parametrize("layers", ["linear", "norms"])
def test_plain_and_cosine_leave_the_step_out(model, tmp_path, layers):
    target, found = tiny.preferences(5, seed=1), {}
    for scale in ("plain", "cosine"):
        trainer = tiny.make_trainer("dpo", model, tmp_path / scale, **{**STEP, "learning_rate": 0.0})
        tiny.stir(trainer)
        method = create_method("inrun_shapley", target=target, keep=1.0, layers=layers, scale=scale)
        trainer.add_callback(SelectionCallback(trainer, method))
        trainer.train()
        found[scale] = trainer.selection.ledger["inrun_shapley"]
    # The rate is 0: the model is where it was, and each example's gradient what it was in the step.
    run = trainer.selection.run
    ids = np.flatnonzero(np.isfinite(found["plain"]))
    assert len(ids) == 6
    aim = method.target_gradient(run)
    for i in ids:
        alone = run.gradients.of(run.rows, np.array([i]), layers=layers)
        product = sum(float((alone[name] * aim[name]).sum()) for name in aim)
        assert found["plain"][i] == pytest.approx(product, rel=1e-4, abs=1e-9)
        assert found["cosine"][i] == pytest.approx(product / (length(alone) * length(aim)), rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("name", ["inrun_shapley", "greats", "less", "grand"])
def test_other_trainers_are_refused(model, tmp_path, reward_trainer, name):
    parameters = {} if name == "grand" else {"target": tiny.preferences(4)}
    for trainer in (tiny.make_trainer("kto", model, tmp_path), reward_trainer()):
        with pytest.raises(ValueError, match=rf"'{name}' .*dpo.*sft"):
            SelectionCallback(trainer, create_method(name, **parameters))


def test_adam_scales_by_the_runs_own_moments(model, tmp_path):
    trainer = tiny.make_trainer("dpo", model, tmp_path, max_steps=2)
    method, witness = (
        create_method("inrun_shapley", target=tiny.preferences(4, seed=1), precondition="adam"),
        tiny.Witness(),
    )
    trainer.add_callback(SelectionCallback(trainer, [method, witness]))
    trainer.train()
    # Before its first step Adam knows nothing, and then the mean of squares is that of one gradient.
    assert "inrun_shapley_product" not in witness.steps[0].values
    assert np.isfinite(witness.steps[1].values["inrun_shapley_product"]).all()
    name, parameter = next((n, p) for n, p in trainer.model.named_parameters() if n.endswith("up_proj.weight"))
    state = trainer.optimizer.state[parameter]
    moments, eps = trainer.selection.run.gradients.second_moments("linear")[name]
    torch.testing.assert_close(moments, state["exp_avg_sq"] / (1 - 0.999 ** float(state["step"])))
    assert eps == trainer.args.adam_epsilon


@pytest.mark.parametrize(
    ("config", "parameters", "others", "message"),
    [
        ({}, {"layers": ["up_prj"]}, (), "layers='up_prj' matches no layer"),
        ({}, {"layers": "lora"}, (), "layers='lora' matches no layer"),
        ({"optim": "sgd"}, {"precondition": "adam"}, (), "optim='sgd' does not keep"),
        ({"optim": "adafactor"}, {"precondition": "adam"}, (), "optim='adafactor' does not keep"),
        ({"torch_compile": True}, {}, (), "torch_compile=False"),
        ({"loss_type": ["sigmoid", "sft"]}, {}, (), "loss_type 'sft'"),
        ({"loss_type": "aot"}, {}, (), "sorts the batch"),
        ({}, {}, ("alpha_dpo",), "train on another loss"),
    ],
)
def test_what_it_cannot_serve_is_refused_before_the_first_step(model, tmp_path, config, parameters, others, message):
    trainer = tiny.make_trainer("dpo", model, tmp_path, **config)
    method = create_method("inrun_shapley", target=tiny.preferences(4, seed=1), **parameters)

    def begin():
        SelectionCallback(trainer, [method, *others])
        trainer.train()

    with pytest.raises(ValueError, match=message):
        begin()
    assert trainer.state.global_step == 0


def test_parameters_that_say_nothing_are_refused():
    target = tiny.preferences(4)
    with pytest.raises(ValueError, match="target=None"):
        create_method("inrun_shapley")
    with pytest.raises(ValueError, match="precondition"):
        create_method("inrun_shapley", target=target, taylor=2, precondition="adam")
    with pytest.raises(ValueError, match="taylor=3"):
        create_method("inrun_shapley", target=target, taylor=3)
    with pytest.raises(ValueError, match="scale"):
        create_method("inrun_shapley", target=target, taylor=2, scale="cosine")
    with pytest.raises(ValueError, match="target_refresh=0"):
        create_method("inrun_shapley", target=target, target_refresh=0)


def test_a_target_of_another_format_is_refused(model, tmp_path):
    trainer = tiny.make_trainer("dpo", model, tmp_path)
    SelectionCallback(trainer, create_method("inrun_shapley", target=tiny.texts(4)))
    with pytest.raises((ValueError, KeyError), match=r"chosen|prompt"):
        trainer.train()
    assert trainer.state.global_step == 0
