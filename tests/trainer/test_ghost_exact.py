"""What a training step says of its examples' gradients, against a backward pass of each example alone."""

import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers import LlamaForCausalLM
from trl import DPOTrainer

from dsel_trl import SelectionCallback, create_method
from tests import tiny
from tests.asking import AsksForAll

STEP = {"max_steps": 2, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 3}
SETTINGS = {
    "dpo": ("dpo", {}),
    "ipo": ("dpo", {"loss_type": "ipo", "gradient_accumulation_steps": 1}),
    "two-losses": ("dpo", {"loss_type": ["sigmoid", "hinge"], "loss_weights": [0.7, 0.3]}),
    "sft": ("sft", {}),
    "lm": ("lm", {"gradient_accumulation_steps": 1}),
    "padding-free": ("sft", {"padding_free": True, "max_length": None}),
    "dpo-lora": ("dpo", {"lora": True}),
    "sft-lora": ("sft", {"lora": True}),
    "checkpointing": ("dpo", {"gradient_checkpointing": True}),
    "checkpointing-reentrant": (
        "sft",
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    ),
    "checkpointing-lora": ("dpo", {"gradient_checkpointing": True, "lora": True}),
    "precomputed": ("dpo", {"precompute_ref_log_probs": True}),
}


def asked(trainer, *others, stirred=True, **how):
    if stirred:
        # Of untouched adapters one half has no gradient, and no margin is apart from the reference's.
        tiny.stir(trainer)
    asks, witness = AsksForAll(**how), tiny.Witness()
    trainer.add_callback(SelectionCallback(trainer, [*others, asks, witness]))
    trainer.train()
    return asks, witness


@pytest.mark.filterwarnings("ignore:.*flash.*")
@pytest.mark.parametrize("name", SETTINGS)
def test_products_are_those_of_each_example_alone(model, tmp_path, name):
    kind, config = SETTINGS[name]
    asks, witness = asked(tiny.make_trainer(kind, model, tmp_path, **{**STEP, **config}))
    assert asks.checked == sum(len(step.ids) for step in witness.steps) > 0
    assert set(asks.apart) == {"dot", "against", "norms", "features", "gram", "step"}


@pytest.mark.parametrize("layers", ["last-1", ["norm", "down_proj"], ["embed_tokens", "linear"]])
def test_chosen_layers(model, tmp_path, layers):
    asks, _ = asked(tiny.make_trainer("dpo", model, tmp_path, **STEP), layers=layers)
    assert asks.checked == 12


def test_rank_stabilised_lora(model, tmp_path):
    trainer = DPOTrainer(
        str(model),
        args=tiny.make_trainer("dpo", model, tmp_path, **STEP).args,
        train_dataset=tiny.preferences(),
        peft_config=LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    asks, _ = asked(trainer, layers="lora")
    assert asks.checked == 12


def test_dora_is_refused(model, tmp_path):
    args = tiny.make_trainer("dpo", model, tmp_path, **STEP).args
    adapter = LoraConfig(r=4, use_dora=True, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = DPOTrainer(str(model), args=args, train_dataset=tiny.preferences(), peft_config=adapter)
    method = create_method("inrun_shapley", target=tiny.preferences(5))
    SelectionCallback(trainer, method)
    with pytest.raises(ValueError, match="use_dora=False"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_tied_head_that_is_fused_cannot_be_asked_for(model, tmp_path):
    policy = LlamaForCausalLM.from_pretrained(model, tie_word_embeddings=True)
    policy.config.tie_word_embeddings = True
    policy.tie_weights()
    assert policy.lm_head.weight is policy.model.embed_tokens.weight
    policy.save_pretrained(tmp_path / "tied")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "tied" / file).write_bytes((model / file).read_bytes())
    asks, _ = asked(tiny.make_trainer("sft", tmp_path / "tied", tmp_path / "linear", **STEP))
    assert asks.checked == 12
    trainer = tiny.make_trainer("sft", tmp_path / "tied", tmp_path / "all", **STEP)
    with pytest.raises(ValueError, match=r"'lm_head'.*fused head"):
        asked(trainer, layers="all")
    assert not any(module._forward_hooks for name, module in trainer.model.named_modules() if name)


@pytest.mark.filterwarnings("ignore:.*flash.*")
@pytest.mark.parametrize(
    ("kind", "config"), [("dpo", {}), ("sft", {}), ("sft", {"padding_free": True, "max_length": None})]
)
def test_weights_are_divided_out(model, tmp_path, kind, config):
    data = tiny.DATASETS[kind](12)
    weights = np.array(data["weight"])
    weights[[2, 5]] = 0.0
    data = data.remove_columns("weight").add_column("weight", weights)
    trainer = tiny.make_trainer(kind, model, tmp_path, dataset=data, **{**STEP, **config})
    asks, witness = asked(trainer, create_method("weight_column"), unknown=(2, 5))
    assert asks.checked == 12
    assert any(weight == 0 for step in witness.steps for weight in step.values["weight"])


class PerToken(tiny.Witness):
    """Weighs some tokens otherwise."""

    name = "per_token"

    def weigh(self, batch):
        weights = torch.ones_like(batch.token_logps)
        rows = (batch.ids < 20).nonzero().squeeze(1)
        weights[rows] = torch.linspace(0.5, 1.5, weights.shape[1])
        return weights


def test_weights_per_token_are_not_known(model, tmp_path):
    trainer = tiny.make_trainer("sft", model, tmp_path, **STEP)
    asks, _ = asked(trainer, PerToken(), unknown=tuple(range(20)))
    assert asks.checked == 12


def test_a_row_that_comes_twice(model, tmp_path):
    class Twice(tiny.Witness):
        name = "twice"

        def plan(self, run, epoch):
            return np.repeat(run.plan_rng().permutation(run.size), 2)

    asks, witness = asked(tiny.make_trainer("dpo", model, tmp_path, **STEP), Twice())
    assert asks.checked == 12
    assert any(len(set(step.ids)) < len(step.ids) for step in witness.steps)


def test_nothing_is_recorded_that_nobody_asked_for(model, tmp_path, monkeypatch):
    class Silent(AsksForAll):
        name = "silent"

        def gradients(self, run):
            return None

        def observe(self, run, step):
            pass

    monkeypatch.setattr("dsel_trl.signals.ghost.GhostRecorder.listen", None)
    trainer = tiny.make_trainer("dpo", model, tmp_path, **STEP)
    trainer.add_callback(SelectionCallback(trainer, Silent()))
    trainer.train()
    assert trainer.state.global_step == 2


def test_listening_changes_nothing(model, tmp_path):
    """The run with in-run values, kept by all, is that without, bit for bit."""

    class Values(AsksForAll):
        name = "values"

        def after_backward(self, run, batch, gradients):
            run.gradients.of(run.rows, np.arange(2), layers="linear")
            return {"values": gradients.dot("v")}

        def observe(self, run, step):
            assert np.isfinite(step.values["values"]).all()

    runs = []
    for name, methods in (("stock", [tiny.Witness()]), ("values", [tiny.Witness(), Values()])):
        trainer = tiny.make_trainer("dpo", model, tmp_path / name, **STEP)
        trainer.add_callback(SelectionCallback(trainer, methods))
        trainer.train()
        runs.append((tiny.losses_of(trainer), tiny.weights_of(trainer)))
    assert runs[0][0] == runs[1][0]
    tiny.assert_same_weights(runs[0][1], runs[1][1])
