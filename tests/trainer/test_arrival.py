"""A weight that does not arrive is an error: real setups either weigh exactly, or stop at their first step."""

import shutil

import pytest
import torch
from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig
from transformers import DataCollatorForSeq2Seq
from trl import DPOTrainer, SFTTrainer
from trl.experimental.utils import DataCollatorForChatML

from dsel_trl import SelectionCallback
from dsel_trl.trainer.forwards import fused_head
from tests import tiny
from tests.weighted import half_weighted

NO_COMPILER = None if shutil.which("g++") else "torch.compile's default backend needs a C++ compiler"


def trained(make_trainer, kind, dataset, cls=None, peft=None, **config):
    """Final parameters of a run that is weighted by the column `weight`."""
    # KTO's KL term is estimated on all completions of a batch, whatever they weigh: this loss has none.
    own = {"loss_type": "apo_zero_unpaired"} if kind == "kto" else {}
    config = {"per_device_train_batch_size": 4, **own, **config}
    trainer = make_trainer(kind, dataset=dataset, max_steps=3, **config)
    if peft is not None:
        trainer = type(trainer)(
            trainer.model, args=trainer.args, train_dataset=dataset, processing_class=trainer.processing_class,
            peft_config=peft,
        )  # fmt: skip
    if cls is not None:
        trainer.__class__ = cls
    trainer.add_callback(SelectionCallback(trainer, "weight_column"))
    trainer.train()
    assert trainer.state.global_step == 3
    return {name.replace("_orig_mod.", ""): value for name, value in tiny.weights_of(trainer).items()}


def assert_zero_rows_do_not_matter(make_trainer, kind, **config):
    """What rows of weight 0 say changes nothing; without the weights it does."""
    even = bool(config.get("torch_compile"))
    runs = [half_weighted(kind, swapped, even) for swapped in (False, True)]
    first, second = (trained(make_trainer, kind, rows, **config) for rows in runs)
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=0, atol=1e-6, msg=name)
    return first


# TorchInductor takes minutes for DPO's three forwards: one of SFT shows that it sees what the others see.
@pytest.mark.parametrize(
    ("kind", "backend"),
    [("dpo", "eager"), ("dpo", "aot_eager"), ("sft", "eager"), ("sft", "aot_eager"), ("sft", "inductor")],
)
def test_weights_are_exact_in_compiled_models(make_trainer, kind, backend):
    if backend == "inductor" and NO_COMPILER:
        pytest.skip(NO_COMPILER)
    # Adam would take rounding for a direction where a gradient is almost zero.
    config = {"optim": "sgd", "learning_rate": 0.05}
    plain = trained(make_trainer, kind, half_weighted(kind, even=True), **config)
    config |= {"torch_compile": True, "torch_compile_backend": backend}
    if kind == "sft" and not fused_head():
        with pytest.raises(ValueError, match=r"\['weight_column'\].*torch_compile=False"):
            trained(make_trainer, kind, half_weighted(kind), **config)
        return
    compiled = assert_zero_rows_do_not_matter(make_trainer, kind, **config)
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", ["dpo", "sft", "kto"])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"gradient_checkpointing": True},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        {"lora": True},
        {"dataloader_num_workers": 2},
        {"accelerator_config": {"split_batches": True}},
    ],
    ids=lambda config: "-".join(config) or "plain",
)
def test_rows_of_weight_zero_do_not_matter(make_trainer, kind, config):
    assert_zero_rows_do_not_matter(make_trainer, kind, **config)


def test_rows_of_weight_zero_do_not_matter_to_a_reward_model(reward_trainer):
    runs = []
    for swapped in (False, True):
        made = reward_trainer(per_device_train_batch_size=4, max_steps=3, optim="sgd", learning_rate=0.05)
        trainer = type(made)(
            made.model, args=made.args, processing_class=made.processing_class,
            train_dataset=half_weighted("dpo", swapped).remove_columns("prompt"),
        )  # fmt: skip
        trainer.add_callback(SelectionCallback(trainer, "weight_column"))
        before = tiny.weights_of(trainer)
        trainer.train()
        runs.append(tiny.weights_of(trainer))
    for name, value in runs[0].items():
        torch.testing.assert_close(value, runs[1][name], rtol=0, atol=1e-6, msg=name)
    assert any((value - before[name]).abs().max() > 1e-4 for name, value in runs[0].items())


def test_rows_of_weight_zero_do_not_matter_without_padding(make_trainer):
    assert_zero_rows_do_not_matter(make_trainer, "sft", padding_free=True, max_length=None)


def test_rows_of_weight_zero_do_not_matter_to_another_collator(make_trainer):
    def make(kind, **config):
        trainer = make_trainer(kind, **config)
        trainer.data_collator = DataCollatorForSeq2Seq(trainer.processing_class, label_pad_token_id=-100)
        return trainer

    assert_zero_rows_do_not_matter(make, "sft")


def test_rows_of_weight_zero_do_not_matter_to_the_chat_collator(make_trainer):
    """TRL's collator for chats pads on the left and adds keys that no model knows."""

    def make(kind, dataset, **config):
        tokenizer = make_trainer(kind, dataset=dataset).processing_class

        def tokenize(row):
            prompt, completion = (tokenizer(row[name])["input_ids"] for name in ("prompt", "completion"))
            return {"input_ids": prompt + completion}

        own = {"dataset_kwargs": {"skip_prepare_dataset": True}, "remove_unused_columns": False}
        trainer = make_trainer(kind, dataset=dataset.map(tokenize, remove_columns=["completion"]), **own, **config)
        trainer.data_collator = DataCollatorForChatML(tokenizer, max_length=64)
        return trainer

    assert_zero_rows_do_not_matter(make, "sft")


@pytest.mark.parametrize(
    "peft",
    [
        LoraConfig(r=4, use_dora=True, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
    ],
    ids=["dora", "ia3"],
)
@pytest.mark.parametrize("kind", ["dpo", "sft"])
def test_rows_of_weight_zero_do_not_matter_for_adapters(make_trainer, kind, peft):
    assert_zero_rows_do_not_matter(make_trainer, kind, peft=peft)


PROMPTS = {"prompt": PromptTuningConfig, "prefix": PrefixTuningConfig, "encoder": PromptEncoderConfig}


@pytest.mark.parametrize(
    ("kind", "prompt"),
    [("dpo", "prompt"), ("dpo", "prefix"), ("sft", "prompt"), ("sft", "prefix"), ("kto", "encoder")],
)
def test_prompt_tuning_is_weighed_exactly(make_trainer, kind, prompt):
    peft = PROMPTS[prompt](num_virtual_tokens=4, task_type="CAUSAL_LM")
    assert_zero_rows_do_not_matter(make_trainer, kind, peft=peft)


@pytest.mark.parametrize(("kind", "prompt"), [("dpo", "prompt"), ("dpo", "prefix"), ("kto", "encoder")])
def test_the_reference_beneath_a_prompt_is_heard(make_trainer, kind, prompt):
    """A prompt that is switched off leaves a forward that no hook of the model beneath it meets."""
    config = {"learning_rate": 0.5, "max_steps": 3, "per_device_train_batch_size": 4}
    own = {"loss_type": "apo_zero_unpaired"} if kind == "kto" else {}
    made = make_trainer(kind, dataset=tiny.DATASETS[kind](16), **config, **own)
    trainer = type(made)(
        made.model, args=made.args, train_dataset=tiny.DATASETS[kind](16), processing_class=made.processing_class,
        peft_config=PROMPTS[prompt](num_virtual_tokens=4, task_type="CAUSAL_LM"),
    )  # fmt: skip
    witness = tiny.attach(trainer, "margin" if kind == "dpo" else "uniform")
    trainer.train()
    logged = [row for row in trainer.state.log_history if "loss" in row]
    for step, row in zip(witness.steps, logged, strict=True):
        if kind == "dpo":
            assert step.values["implicit_margin"].mean() == pytest.approx(row["rewards/margins"], rel=1e-4, abs=1e-5)
        assert step.values["loss"].mean() == pytest.approx(row["loss"], rel=1e-5)
    assert abs(logged[-1]["loss"] - logged[0]["loss"]) > 1e-3
    trainer.selection.detach()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in trainer.model.modules())


# ---- What goes around the gate ----


class OwnLoss(SFTTrainer):
    """Takes the loss that the model computes."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(**inputs).loss


class OwnHead(SFTTrainer):
    """Goes around the model's forward: the backbone, then the head."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logits = model.lm_head(model.model(input_ids=inputs["input_ids"]).last_hidden_state)
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())


class OwnPenalty(SFTTrainer):
    """Trains on something else than the log-probabilities."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with torch.no_grad():
            super().compute_loss(model, inputs, False, num_items_in_batch)
        loss = super().compute_loss(model, inputs, False, num_items_in_batch)
        return loss.detach() + model.lm_head.weight.pow(2).mean()


class OwnInputs(DPOTrainer):
    """Passes on what the model's forward knows, and no more."""

    def _prepare_inputs(self, inputs):
        known = ("input_ids", "attention_mask", "completion_mask")
        return super()._prepare_inputs({key: inputs[key] for key in known})


class OwnStep(DPOTrainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        known = ("input_ids", "attention_mask", "completion_mask")
        return super().training_step(model, {key: inputs[key] for key in known}, num_items_in_batch)


class OwnLoader(DPOTrainer):
    def get_train_dataloader(self):
        rows = self.train_dataset.remove_columns(
            [name for name in self.train_dataset.column_names if not name.endswith("_ids")]
        )
        return torch.utils.data.DataLoader(rows, batch_size=2, collate_fn=self.data_collator)


class HalfAgain(DPOTrainer):
    """Runs the chosen half once more, beside the loss."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        half = {key: inputs[key].chunk(2)[0] for key in ("input_ids", "attention_mask")}
        again = model(**half).logits.float().pow(2).mean()
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch) + 0.0 * again


@pytest.mark.parametrize(
    ("kind", "cls", "message"),
    [
        ("sft", OwnPenalty, r"\['weight_column'\] did not reach the gradient.*compute_loss"),
        ("sft", OwnHead, r"no forward of the model on this batch was seen: OwnHead"),
        ("dpo", OwnInputs, r"without the ids of its examples.*_prepare_inputs"),
        ("dpo", OwnStep, r"without the ids of its examples.*training_step"),
        ("dpo", OwnLoader, r"without the ids of its examples.*get_train_dataloader"),
    ],
)
def test_weights_that_cannot_arrive_stop_the_first_step(make_trainer, kind, cls, message):
    trainer = make_trainer(kind, max_steps=2)
    trainer.__class__ = cls
    before = tiny.weights_of(trainer)
    trainer.add_callback(SelectionCallback(trainer, "weight_column"))
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0
    tiny.assert_same_weights(tiny.weights_of(trainer), before)


@pytest.mark.parametrize(
    ("kind", "cls"),
    [
        ("sft", OwnLoss),
        ("sft", OwnHead),
        ("sft", OwnPenalty),
        ("dpo", OwnInputs),
        ("dpo", OwnStep),
        ("dpo", OwnLoader),
    ],
)
def test_what_reads_nothing_never_fails(make_trainer, kind, cls):
    stock, selected = (make_trainer(kind, max_steps=2) for _ in range(2))
    stock.__class__ = selected.__class__ = cls
    selected.add_callback(SelectionCallback(selected, "uniform"))
    stock.train()
    selected.train()
    assert tiny.losses_of(selected) == tiny.losses_of(stock)
    tiny.assert_same_weights(tiny.weights_of(selected), tiny.weights_of(stock))


def test_the_loss_that_the_model_computes_is_weighed_exactly(make_trainer):
    assert_zero_rows_do_not_matter(make_trainer, "sft", cls=OwnLoss)


def test_coupled_losses_train_under_uniform(make_trainer):
    stock, selected = (make_trainer("dpo", max_steps=2, loss_type=["aot"]) for _ in range(2))
    selected.add_callback(SelectionCallback(selected, "uniform"))
    stock.train()
    selected.train()
    tiny.assert_same_weights(tiny.weights_of(selected), tiny.weights_of(stock))


def test_forwards_on_other_rows_are_not_the_batch(make_trainer):
    own = trained(make_trainer, "dpo", half_weighted("dpo"), cls=HalfAgain)
    plain = trained(make_trainer, "dpo", half_weighted("dpo"))
    for name, value in plain.items():
        torch.testing.assert_close(own[name], value, rtol=0, atol=1e-6, msg=name)
    assert_zero_rows_do_not_matter(make_trainer, "dpo", cls=HalfAgain)


# ---- Attaching is all or nothing ----


@pytest.mark.parametrize(
    ("method", "parameters"),
    [("weight_column", {"column": "nowhere"}), ("margin", {}), ("random", {"keep": 0.5})],
)
def test_a_refused_attach_leaves_the_trainer_as_it_was(make_trainer, method, parameters):
    trainer = make_trainer("sft", max_steps=1, per_device_train_batch_size=32, dataloader_drop_last=True)
    cls, callbacks = type(trainer), list(trainer.callback_handler.callbacks)
    hooks = [len(module._forward_hooks) for module in trainer.model.modules()]
    with pytest.raises(ValueError, match=r"nowhere|works with|would be kept|fewer than"):
        trainer.add_callback(SelectionCallback(trainer, method, **parameters)) or trainer.train()
    if trainer.__dict__.get("selection") is not None:
        trainer.selection.detach()
    assert type(trainer) is cls
    assert "selection" not in trainer.__dict__
    assert [len(module._forward_hooks) for module in trainer.model.modules()] == hooks
    assert trainer.callback_handler.callbacks == callbacks


def test_detaching_before_the_callback_is_added(make_trainer):
    trainer = make_trainer("dpo")
    callback = SelectionCallback(trainer, "uniform")
    callback.detach()
    assert type(trainer) is DPOTrainer
