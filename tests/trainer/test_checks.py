"""Bad input gets an error before the first step that names the culprit, and nothing on disk is touched."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from dsel_trl import Method, SelectionCallback, create_method, register
from dsel_trl.core.composition import Composition
from dsel_trl.core.parameters import check_choice, check_range, check_refresh
from tests import tiny
from tests.live import LiveOrder, PickLongest


def without(column):
    return tiny.preferences(12).remove_columns([column])


def empty_column(column):
    rows = tiny.preferences(12).remove_columns([column])
    return rows.add_column(column, [float("nan")] * 12)


def with_text(column):
    return tiny.preferences(12).remove_columns([column]).add_column(column, ["high"] * 12)


def nothing():
    return Dataset.from_dict({name: [] for name in ("input_ids", "labels")})


EXPLICIT = ("margin", {"source": "explicit"})
RENAMED = ("margin", {"source": "explicit", "score_chosen_column": "up"})
MISTYPED = ("margin", {"source": "explicitt"})
# What is wrong: trainer arguments, the method, and what the message says.
BAD = {
    "missing_column": ({"dataset": without("score_chosen")}, EXPLICIT, r"'margin'.*'score_chosen'.*does not have"),
    "renamed_column": ({}, RENAMED, r"'up'.*prompt"),
    "missing_weight": ({"dataset": without("weight")}, ("weight_column", {}), r"'weight_column'.*'weight'"),
    "nan_only": ({"dataset": empty_column("score_rejected")}, EXPLICIT, r"'score_rejected'.*every row is NaN"),
    "text_column": ({"dataset": with_text("score_chosen")}, EXPLICIT, r"'score_chosen' holds .*string"),
    "truth": ({}, ("weight_column", {"column": "truth_flipped"}), r"'truth_flipped'.*no method may read"),
    "keep_0": ({}, ("random", {"keep": 0}), r"keep=0 is not a number in \(0, 1\]"),
    "keep_1.4": ({}, ("random", {"keep": 1.4}), r"keep=1\.4"),
    "keep_text": ({}, ("random", {"keep": "half"}), r"keep='half'"),
    "unknown_method": ({}, ("randon", {}), r"Unknown method 'randon'\. Did you mean 'random'"),
    "unknown_parameter": ({}, ("random", {"keeep": 0.5}), r"Unknown parameter 'keeep'.*Did you mean 'keep'"),
    "unknown_choice": ({}, MISTYPED, r"source='explicitt'.*Did you mean 'explicit'"),
    "aot": ({"loss_type": ["aot"]}, ("weight_column", {}), r"\['aot'\] sorts the batch.*weight_column"),
    "aot_in_a_mix": ({"loss_type": ["sigmoid", "aot_unpaired"]}, ("dr_dpo", {}), r"aot_unpaired"),
    "too_small": (
        {"dataset": tiny.preferences(3), "per_device_train_batch_size": 4, "dataloader_drop_last": True},
        ("uniform", {}),
        r"3 examples, fewer than one batch of 4 \(4 x 1 processes x 1 candidates\), and dataloader_drop_last=True",
    ),
    "too_few_candidates": (
        {"dataset": tiny.preferences(3), "dataloader_drop_last": True},
        (PickLongest, {}),
        r"3 examples, fewer than one batch of 4 \(2 x 1 processes x 2 candidates\).*an epoch has no step",
    ),
    "sampling": ({"train_sampling_strategy": "sequential"}, ("random", {}), r"'sequential' orders.*\['random'\]"),
}


def make(method, parameters):
    return create_method(method, **parameters) if isinstance(method, str) else method(**parameters)


def make_trainer_on_old_output(make_trainer, **config):
    """A trainer whose output folder holds the checkpoint of an earlier run."""
    trainer = make_trainer("dpo", max_steps=2, save_strategy="steps", save_steps=2, **config)
    output = Path(trainer.args.output_dir)
    (output / "checkpoint-2" / "selection").mkdir(parents=True)
    for name in ("checkpoint-2/trainer_state.json", "checkpoint-2/selection/state.json", "selection.txt"):
        (output / name).write_text("kept")
    return trainer


def assert_untouched(trainer):
    files = [path for path in Path(trainer.args.output_dir).rglob("*") if path.is_file()]
    assert [path.read_text() for path in files] == ["kept"] * 3
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("bad", BAD)
def test_the_error_names_the_culprit_and_touches_nothing(make_trainer, bad):
    config, method, message = BAD[bad]
    trainer = make_trainer_on_old_output(make_trainer, **config)
    stock = type(trainer)
    with pytest.raises(ValueError, match=message):
        SelectionCallback(trainer, make(*method))
    assert type(trainer) is stock
    assert_untouched(trainer)


def test_what_only_a_plan_shows(make_trainer):
    trainer = make_trainer_on_old_output(make_trainer, dataset=tiny.preferences(12), dataloader_drop_last=True)
    SelectionCallback(trainer, "random", keep=0.1)
    message = "Only 1 of 12 examples would be kept per epoch, fewer than one batch of 2, and dataloader_drop_last=True"
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert_untouched(trainer)


def test_a_refused_selection_leaves_a_trainer_that_trains(make_trainer):
    trainer = make_trainer("dpo", max_steps=1)
    with pytest.raises(ValueError, match="keep"):
        SelectionCallback(trainer, "random", keep=0)
    trainer.train()
    assert trainer.state.global_step == 1


def test_packing_with_a_method_that_needs_single_examples(make_trainer):
    trainer = make_trainer("lm", packing=True, max_length=32)
    with pytest.raises(ValueError, match=r"'weight_column' needs single examples.*packing=True"):
        SelectionCallback(trainer, "weight_column")


def test_mean_weights_over_an_accumulated_deepspeed_step(make_trainer, monkeypatch):
    """DeepSpeed steps inside the backward pass of the last micro-batch: too early for the mean over all of them."""
    trainer = make_trainer_on_old_output(make_trainer, gradient_accumulation_steps=2)
    stock = type(trainer)
    monkeypatch.setattr(trainer, "is_deepspeed_enabled", True)
    with pytest.raises(ValueError, match=r"\['weight_column'\] average.*gradient_accumulation_steps=2 micro-batches"):
        SelectionCallback(trainer, "weight_column")
    assert type(trainer) is stock
    assert_untouched(trainer)
    SelectionCallback(trainer, "weight_column", normalize="none")


def test_embeddings_of_a_policy_that_is_not_in_place(make_trainer, monkeypatch):
    """Neither the trainer's arguments nor its model need tell: `accelerate launch` alone decides it."""
    trainer = make_trainer_on_old_output(make_trainer)
    monkeypatch.setattr(trainer, "is_fsdp_enabled", True)
    trainer.add_callback(SelectionCallback(trainer, "semdedup", embedding="policy"))
    with pytest.raises(ValueError, match="embedding='policy' needs the whole model before training"):
        trainer.train()
    assert_untouched(trainer)


def test_pairs_only(make_trainer):
    with pytest.raises(ValueError, match=r"'dr_dpo' works with \['dpo', 'kto', 'reward'\], not with SFTTrainer"):
        SelectionCallback(make_trainer("sft"), "dr_dpo")


def test_an_empty_dataset(make_trainer):
    trainer = make_trainer("sft")
    trainer.train_dataset = trainer.train_dataset.select([])
    with pytest.raises(ValueError, match="train_dataset is empty"):
        SelectionCallback(trainer, "uniform")


def test_a_stream_cannot_be_planned(make_trainer):
    stream = tiny.completions(8).to_iterable_dataset()
    trainer = make_trainer("sft", dataset=stream, max_steps=2)
    with pytest.raises(ValueError, match=r"\['random'\] plan ahead.*streaming"):
        SelectionCallback(trainer, "random")


def test_two_that_order():
    with pytest.raises(ValueError, match=r"\['live_order', 'length_curriculum'\] all order the examples"):
        Composition([LiveOrder(), create_method("length_curriculum")])


def test_two_that_pick():
    with pytest.raises(ValueError, match=r"pick_longest.*select_k_of_b.*pick"):
        Composition([PickLongest(), create_method("select_k_of_b")])


def test_the_same_method_twice():
    with pytest.raises(ValueError, match="'random' is given twice"):
        Composition([create_method("random"), create_method("random", keep=0.3)])


def test_no_method():
    with pytest.raises(ValueError, match="No method given"):
        Composition([])


@pytest.mark.parametrize(
    ("method", "parameters", "error", "message"),
    [
        (create_method("uniform"), {"keep": 1}, ValueError, r"\['keep'\] go with a method given by name"),
        (3, {}, TypeError, "must be a Method object, a name or a list"),
        (Method, {}, TypeError, "must be a Method object"),
        ({"name": "random"}, {}, TypeError, "must be a Method object"),
    ],
    ids=["parameters", "number", "class", "mapping"],
)
def test_what_is_not_a_method(make_trainer, method, parameters, error, message):
    with pytest.raises(error, match=message):
        SelectionCallback(make_trainer("dpo"), method, **parameters)


def test_a_plan_without_examples(make_trainer):
    class PlansNothing(Method):
        """Plans nothing."""

        name = "plans_nothing"

        def plan(self, run, epoch):
            return np.empty(0, dtype=np.int64)

        def epoch_size(self, run):
            return run.size

    trainer = make_trainer("dpo")
    trainer.add_callback(SelectionCallback(trainer, PlansNothing()))
    with pytest.raises(ValueError, match="The plan is empty"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert not list(Path(trainer.args.output_dir).glob("checkpoint-*"))


# ---- The registry ----


@pytest.mark.parametrize("name", ["Upper", "with space", "1st"])
def test_names_are_lower_case_identifiers(name):
    with pytest.raises(ValueError, match="lower-case identifier"):
        register(name)


def test_a_taken_name():
    class Another(Method):
        """Another method."""

    with pytest.raises(ValueError, match="'random' is taken by Random"):
        register("random")(Another)


def test_a_method_needs_a_card():
    @dataclass
    class NoCard(Method):
        keep: float = 0.5

    with pytest.raises(ValueError, match="NoCard needs a docstring"):
        register("no_card")(NoCard)
    NoCard.__doc__ = None
    with pytest.raises(ValueError, match="NoCard needs a docstring"):
        register("no_card")(NoCard)


def test_only_methods_are_registered():
    with pytest.raises(TypeError, match="is not a Method"):
        register("not_a_method")(dict)


# ---- The checks of parameters ----


@pytest.mark.parametrize("value", [0, 1.0001, -1, float("nan"), True, None, "0.5"])
def test_outside_a_half_open_range(value):
    with pytest.raises(ValueError, match=r"share=.* is not a number in \(0, 1\]"):
        check_range("share", value, 0, 1, open_low=True)


@pytest.mark.parametrize("value", [1, 0.5, 1e-9])
def test_inside_a_half_open_range(value):
    check_range("share", value, 0, 1, open_low=True)


@pytest.mark.parametrize("value", [0, -3, 2.5, True, "never", None])
def test_no_interval(value):
    with pytest.raises(ValueError, match="refresh="):
        check_refresh(value)


@pytest.mark.parametrize("value", [1, 50, "epoch"])
def test_an_interval(value):
    check_refresh(value)


def test_a_choice():
    check_choice("mode", "a", ("a", "b"))
    with pytest.raises(ValueError, match=r"mode='lnear' is none of \['linear', 'root'\]. Did you mean 'linear'"):
        check_choice("mode", "lnear", ("linear", "root"))


@pytest.mark.parametrize("kind", ["dpo", "sft", "kto"])
def test_a_kernel_that_hides_the_log_probabilities_is_refused(make_trainer, monkeypatch, kind):
    """Up to TRL 1.14, which has no head of its own that gives them."""
    trainer = make_trainer(kind)
    trainer.args.use_liger_kernel = True
    monkeypatch.setattr("dsel_trl.trainer.checks.fused_head", lambda: None)
    with pytest.raises(ValueError, match="use_liger_kernel=False"):
        SelectionCallback(trainer, "random")
    monkeypatch.setattr("dsel_trl.trainer.checks.fused_head", lambda: print)
    SelectionCallback(trainer, "random")
