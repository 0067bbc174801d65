"""Helper runs: the run's own loss, from the policy as it is, and told apart by all that decides them."""

import dataclasses
from operator import attrgetter

import numpy as np
import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, KTOConfig, RewardConfig, SFTConfig

from dsel_trl import SelectionCallback
from dsel_trl.core import helper_settings
from dsel_trl.data.demo.corpus import demo_preferences
from dsel_trl.data.demo.model import build_demo_model
from dsel_trl.trainer.helper_run import initial_copy, train_helper
from tests import tiny

CONFIGS = (DPOConfig, SFTConfig, KTOConfig, RewardConfig)

# Fields of the configurations that a helper run does not share with the run, and why.
NOT_SHARED = {
    "a prepared dataset is taken over as it is": (
        "assistant_only_loss",
        "chat_template_path",
        "completion_only_loss",
        "dataset_kwargs",
        "dataset_num_proc",
        "dataset_text_field",
        "eos_token",
        "eval_packing",
        "length_column_name",
        "pad_token",
        "packing",
        "packing_strategy",
        "remove_unused_columns",
        "shuffle_dataset",
    ),
    "the layout of a batch changes no loss, and a helper's rows are laid out in the plain way": (
        "dataloader_drop_last",
        "dataloader_in_order",
        "pad_to_multiple_of",
        "padding_free",
    ),
    "a helper's reference is its own start": (
        "precompute_ref_batch_size",
        "precompute_ref_log_probs",
        "ref_model_mixup_alpha",
        "ref_model_sync_steps",
        "sync_ref_model",
    ),
    "the model is made already": ("model_init_kwargs", "trust_remote_code", "use_cache"),
    "a helper run is one whole pass of its own, in random order": (
        "auto_find_batch_size",
        "data_seed",
        "dataloader_persistent_workers",
        "ignore_data_skip",
        "lr_scheduler_kwargs",
        "max_steps",
        "train_sampling_strategy",
    ),
    "what takes the place of layers or of the forward could hide the log-probabilities of a helper": (
        "liger_kernel_config",
        "torch_compile",
        "torch_compile_backend",
        "torch_compile_mode",
        "use_liger_kernel",
    ),
    "passes before training need the whole model in place": (
        "accelerator_config",
        "deepspeed",
        "fsdp",
        "fsdp_config",
        "parallelism_config",
    ),
    "it evaluates nothing": (
        "batch_eval_metrics",
        "bf16_full_eval",
        "do_eval",
        "do_predict",
        "do_train",
        "eval_accumulation_steps",
        "eval_delay",
        "eval_do_concat_batches",
        "eval_on_start",
        "eval_steps",
        "eval_strategy",
        "eval_use_gather_object",
        "fp16_full_eval",
        "greater_is_better",
        "include_for_metrics",
        "label_names",
        "load_best_model_at_end",
        "metric_for_best_model",
        "per_device_eval_batch_size",
        "prediction_loss_only",
    ),
    "it logs, saves and publishes nothing": (
        "debug",
        "enable_jit_checkpoint",
        "hub_always_push",
        "hub_model_id",
        "hub_private_repo",
        "hub_revision",
        "hub_strategy",
        "hub_token",
        "include_num_input_tokens_seen",
        "local_rank",
        "log_level",
        "log_level_replica",
        "log_on_each_node",
        "logging_first_step",
        "logging_nan_inf_filter",
        "logging_steps",
        "project",
        "push_to_hub",
        "restore_callback_states_from_checkpoint",
        "resume_from_checkpoint",
        "run_name",
        "save_on_each_node",
        "save_only_model",
        "save_steps",
        "save_total_limit",
        "skip_memory_metrics",
        "trackio_bucket_id",
        "trackio_space_id",
        "trackio_static_space_id",
    ),
}


# ---- What is shared ----


@pytest.mark.parametrize("config", CONFIGS)
def test_every_argument_of_the_trainers_is_shared_or_said_not_to_be(config):
    """A new field of TRL's fails here: does it decide the loss?"""
    fields = {field.name for field in dataclasses.fields(config)}
    known = [*helper_settings.SHARED, *helper_settings.OWN, *(name for names in NOT_SHARED.values() for name in names)]
    assert sorted(fields - set(known)) == []
    assert len(known) == len(set(known))


def test_no_argument_is_named_that_no_trainer_has():
    fields = {field.name for config in CONFIGS for field in dataclasses.fields(config)}
    # Names that transformers has from 5.23 on.
    later = {name for name in helper_settings.SHARED if name.startswith("activation_checkpointing")}
    fields |= later if later.isdisjoint(fields) else set()
    named = {name for names in NOT_SHARED.values() for name in names}
    assert sorted((named | {*helper_settings.SHARED, *helper_settings.OWN}) - fields) == []


loss = attrgetter("loss")


def helped(run, measure, **how):
    """What all examples measure under a helper that learns nothing."""
    ids = np.arange(run.size)
    return run.train_helper(ids[:8], ids, measure, evaluations=1, learning_rate=0.0, **how)[-1]


def losses(trainer, **how):
    """Losses of all examples under a helper that learns nothing, and under the policy itself."""
    found = []

    class Look(tiny.Witness):
        def setup(self, run):
            found.extend([helped(run, loss, **how), run.passes.measure(loss)])

    trainer.add_callback(SelectionCallback(trainer, Look()))
    trainer.train()
    return found


@pytest.mark.parametrize(
    "config",
    [
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.05]},
        {"loss_type": ["sigmoid", "bco_pair"], "loss_weights": [0.3, 0.7]},
        {"loss_type": ["sigmoid"], "label_smoothing": 0.3},
        {"loss_type": ["discopop"], "discopop_tau": 0.5},
        {"loss_type": ["sft"], "ld_alpha": 0.2},
        {"use_weighting": True},
    ],
    ids=lambda config: "-".join(config),
)
def test_a_helper_has_the_loss_of_the_run(make_trainer, config):
    trainer = make_trainer("dpo", max_steps=1, learning_rate=0.0, **config)
    helper, own = losses(trainer, lora=False)
    np.testing.assert_allclose(helper, own, rtol=1e-5)


def test_the_divergence_is_shared(make_trainer):
    """At its start every divergence has one loss: look at the settings themselves."""
    args = make_trainer("dpo", f_divergence_type="alpha_divergence", f_alpha_divergence_coef=0.5).args
    shared = helper_settings.helper_arguments(args)
    assert (shared["f_divergence_type"], shared["f_alpha_divergence_coef"]) == (args.f_divergence_type, 0.5)
    assert DPOConfig("out", **shared).f_divergence_type == args.f_divergence_type


# ---- Where it starts ----


def continued(model, **how):
    """A policy with an adapter that has been trained: it is not zero."""
    base = AutoModelForCausalLM.from_pretrained(model)
    how = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **how}
    policy = get_peft_model(base, LoraConfig(**how))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return policy


def trainer_of(policy, tmp_path, model, **config):
    args = DPOConfig(str(tmp_path / "out"), **{**tiny.COMMON, "learning_rate": 0.0, "max_steps": 1, **config})
    return DPOTrainer(
        policy,
        args=args,
        train_dataset=tiny.preferences(),
        processing_class=AutoTokenizer.from_pretrained(model),
    )


ADAPTERS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "ranks": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 3}},
    "head": {"modules_to_save": ["lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
}


def logps(model, trainer):
    tokens = torch.arange(3, 40).reshape(1, -1)
    training = model.training
    with torch.no_grad():
        found = model.eval()(input_ids=tokens).logits.log_softmax(-1)
    model.train(training)
    return found


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_copy_is_the_policy_as_it_is(model, tmp_path, adapter):
    policy = continued(model, **ADAPTERS[adapter])
    trainer = trainer_of(policy, tmp_path, model)
    before = tiny.weights_of(trainer)
    with policy.disable_adapter():
        base = logps(policy, trainer)
    assert (logps(policy, trainer) - base).abs().max() > 0.05
    copied = initial_copy(trainer)
    torch.testing.assert_close(logps(copied, trainer), logps(policy, trainer), rtol=1e-4, atol=1e-4)
    assert not any("lora" in name for name, _ in copied.named_parameters())
    tiny.assert_same_weights(tiny.weights_of(trainer), before)


def test_of_several_adapters_the_active_one_counts(model, tmp_path):
    policy = continued(model)
    policy.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B.other" in name:
                parameter.add_(0.3)
    trainer = trainer_of(policy, tmp_path, model)
    found = {}
    for name in ("default", "other"):
        policy.set_adapter(name)
        found[name] = logps(policy, trainer)
        torch.testing.assert_close(logps(initial_copy(trainer), trainer), found[name], rtol=1e-4, atol=1e-4)
    assert (found["default"] - found["other"]).abs().max() > 0.05


def test_a_policy_that_no_weights_are_is_refused(make_trainer, model):
    base = AutoModelForCausalLM.from_pretrained(model)
    policy = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    trainer = make_trainer("dpo")
    trainer.model = policy
    with pytest.raises(ValueError, match="PROMPT_TUNING"):
        initial_copy(trainer)


@pytest.mark.parametrize("lora", [True, False])
def test_a_helper_of_a_continued_run_starts_from_its_policy(model, tmp_path, lora):
    """And DPO's margin of it is zero: its reference is where it starts, not where the run's reference is."""
    policy = continued(model)
    trainer = trainer_of(policy, tmp_path, model)
    found = {}

    class Look(tiny.Witness):
        def setup(self, run):
            for name in ("policy_chosen_logps", "implicit_margin"):
                measure = attrgetter(name)
                found[name] = helped(run, measure, lora=lora), run.passes.measure(measure)

    trainer.add_callback(SelectionCallback(trainer, Look()))
    trainer.train()
    np.testing.assert_allclose(*found["policy_chosen_logps"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found["implicit_margin"][0], 0.0, atol=1e-5)


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("measure", ["implicit_margin", "log_ratio_margin", "loss"])
def test_another_model_is_compared_with_its_own_start(make_trainer, tmp_path, measure, lora):
    """Not with the log-probabilities that the run has computed of its own reference: those are in its dataset."""
    other = str(tiny.build_model(tmp_path / "other", seed=9))
    trainer = make_trainer("dpo", max_steps=1, precompute_ref_log_probs=True)
    found = []

    class Look(tiny.Witness):
        def setup(self, run):
            found.append(helped(run, attrgetter(measure), lora=lora, model=other))

    trainer.add_callback(SelectionCallback(trainer, Look()))
    assert "ref_chosen_logps" in trainer.train_dataset.column_names
    trainer.train()
    np.testing.assert_allclose(found[0], np.log(2) if measure == "loss" else 0.0, atol=1e-5)


def test_an_adapter_learns_at_a_rate_of_its_own(make_trainer):
    args = make_trainer("dpo", learning_rate=1e-6).args
    assert helper_settings.helper_arguments(args)["learning_rate"] == helper_settings.LORA_LEARNING_RATE
    assert helper_settings.helper_arguments(args, lora=False)["learning_rate"] == 1e-6
    assert helper_settings.helper_arguments(args, learning_rate=0.5)["learning_rate"] == 0.5


@pytest.fixture(scope="module")
def demo_model(tmp_path_factory):
    return build_demo_model(tmp_path_factory.mktemp("demo") / "model", steps=150)


def difficulty_finds_flips(demo_model, tmp_path, **parameters):
    """How well SelectiveDPO's difficulty tells flipped pairs (AUC), at TRL's own learning rate and precision."""
    rows = demo_preferences(0, train_size=512, test_size=8)["train"]
    flipped = np.array(rows["truth_flipped"])
    args = DPOConfig(str(tmp_path / "out"), use_cpu=True, max_steps=1, max_length=128, report_to="none", bf16=True)
    assert args.learning_rate == 1e-6
    rows = rows.remove_columns([name for name in rows.column_names if name.startswith("truth_")])
    trainer = DPOTrainer(str(demo_model), args=args, train_dataset=rows)
    callback = SelectionCallback(trainer, "selective_dpo", evaluations=1, helper_epochs=2.0, **parameters)
    trainer.add_callback(callback)
    trainer.train()
    hard = -callback.ledger["selective_dpo"]
    above = hard[flipped][:, None] - hard[~flipped][None]
    return ((above > 0) + 0.5 * (above == 0)).mean()


def test_a_lora_helper_learns_at_the_defaults(demo_model, tmp_path, caplog):
    assert difficulty_finds_flips(demo_model, tmp_path) > 0.65
    assert "next to nothing" not in caplog.text


def test_a_helper_that_learned_nothing_is_told(demo_model, tmp_path, caplog):
    """The run's own learning rate would not do."""
    assert difficulty_finds_flips(demo_model, tmp_path, helper_learning_rate=1e-6) < 0.6
    assert "learned next to nothing at the learning rate 1e-06" in caplog.text


@pytest.mark.parametrize("kind", ["sft", "kto"])
def test_helpers_of_every_trainer_tell_that_they_learned_nothing(make_trainer, caplog, kind):
    class Look(tiny.Witness):
        def setup(self, run):
            ids = np.arange(run.size)
            for rate, told in ((1e-6, True), (3e-3, False)):
                caplog.clear()
                run.train_helper(ids, ids, loss, evaluations=1, learning_rate=rate)
                assert ("learned next to nothing" in caplog.text) == told, (rate, caplog.text)

    trainer = make_trainer(kind, max_steps=1, bf16=True)
    trainer.add_callback(SelectionCallback(trainer, Look()))
    trainer.train()


def test_an_adapter_is_kept_in_float32(make_trainer, monkeypatch):
    """Its steps are smaller than what bfloat16 can add to its weights, whatever the weights beneath are kept in."""
    seen = {}

    def look(trainer, helper, train_ids):
        for name, parameter in helper.model.named_parameters():
            seen.setdefault("lora" in name, set()).add(parameter.dtype)

    monkeypatch.setattr("dsel_trl.trainer.helper_run._count", look)

    class Look(tiny.Witness):
        def setup(self, run):
            helped(run, loss)

    trainer = make_trainer("dpo", max_steps=1, bf16=True, model_init_kwargs={"dtype": "bfloat16"})
    trainer.add_callback(SelectionCallback(trainer, Look()))
    trainer.train()
    assert seen == {True: {torch.float32}, False: {torch.bfloat16}}


@pytest.mark.parametrize(
    ("name", "parameters", "untrained"),
    [
        ("bees", {"sources": ["helper"]}, 0.0),
        ("selective_dpo", {"evaluations": 1}, 0.0),
        ("rho_loss", {"factor": 2}, np.log(2)),
        ("s2l", {"checkpoints": 1, "clusters": 2}, np.log(2)),
    ],
)
def test_an_untrained_helper_has_no_margin_where_references_are_precomputed(
    make_trainer, monkeypatch, tmp_path, name, parameters, untrained
):
    """And what it cost is what the card says: it asks its own start, whatever the run has in its dataset."""
    found = []

    def spy(*args, **how):
        found.append(train_helper(*args, **how))
        return found[-1]

    monkeypatch.setattr("dsel_trl.trainer.run.train_helper", spy)
    other = str(tiny.build_model(tmp_path / "other", seed=9))
    trainer = make_trainer("dpo", max_steps=1, precompute_ref_log_probs=True)
    settings = {"helper_model": other, "helper_learning_rate": 0.0, "helper_epochs": 1.0}
    callback = SelectionCallback(trainer, name, **parameters, **settings)
    trainer.train()
    assert found
    for values in found:
        np.testing.assert_allclose(values[np.isfinite(values)], untrained, atol=1e-5)
    expected = callback.methods.methods[0].expected_cost(callback.run)
    for what in ("helper_forwards", "helper_reference_forwards", "helper_backwards"):
        least, most = expected[what]
        assert least <= callback.costs.counts[what] <= most, what
