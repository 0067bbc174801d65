"""Every registered method keeps the promises of a run: one suite, parametrised over the registry."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import set_seed

from dsel_trl import Method, SelectionCallback, get_method
from dsel_trl.core.costs import WORK
from dsel_trl.trainer.forwards import base_model
from tests import tiny
from tests.contract.bench import CONFIG, data, loading
from tests.contract.cases import EVERYWHERE, GUISES, LABELLED, METHODS, NEUTRAL, case, first_kind, kinds, make
from tests.contract.checks import (
    assert_acts,
    assert_idle,
    assert_says_why,
    assert_sound,
    assert_unknown_displaces_nothing,
)
from tests.distributed.launch import launched


def attach(trainer, methods):
    callback = SelectionCallback(trainer, methods)
    trainer.add_callback(callback)
    return callback


# ---- It trains ----


@pytest.mark.parametrize(("name", "kind"), EVERYWHERE)
def test_trains_and_ends_epochs_in_short_batches(bench, name, kind):
    run = bench.whole(name, kind)
    assert_sound(run.trace)
    assert set(run.saved) == {0, 1}, "an epoch of a single step has no inside: keep more of the data"
    summary = json.loads((run.output_dir / "selection" / "summary.json").read_text())
    assert summary["methods"][0]["name"] == name.split(":")[0]
    assert summary["examples_trained"] == sum(map(len, run.trace.ids))


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, kind in EVERYWHERE if name in METHODS])
def test_trains_with_lora_and_precomputed_references(bench, name, kind):
    config = {"lora": True, "max_steps": 2}
    if kind == "dpo":
        config["precompute_ref_log_probs"] = True
    trainer, witness = bench.attached(name, kind, **config)
    before = tiny.weights_of(trainer)
    trainer.train()
    trace = tiny.Trace.of(trainer, witness)
    assert_sound(trace)
    moved = {key for key, value in before.items() if not torch.equal(value, trace.weights[key])}
    assert all("lora_" in key for key in moved)


@pytest.mark.parametrize("name", LABELLED)
def test_trains_on_labelled_responses(bench, name):
    trainer, witness = bench.attached(name, "kto", max_steps=3)
    trainer.train()
    trace = tiny.Trace.of(trainer, witness)
    assert_sound(trace)
    assert len(trace.ids) == 3
    assert all(np.isfinite(values["implicit_margin"]).all() for values in trace.values)


@pytest.mark.parametrize(("name", "kind"), NEUTRAL)
def test_neutral_parameters_are_stock_bit_for_bit(bench, name, kind):
    trainer = bench.trainer(kind, name)
    attach(trainer, make(name, case(name).neutral))
    trainer.train()
    stock = bench.stock(kind, name)
    assert tiny.losses_of(trainer) == stock.losses
    tiny.assert_same_weights(tiny.weights_of(trainer), stock.weights)


@pytest.mark.parametrize("name", [name for name in METHODS if get_method(name).packed_rows and "sft" in kinds(name)])
def test_packed_rows_where_the_method_says_so(bench, name):
    trainer = bench.trainer("sft", name, packing=True, max_length=16, max_steps=2)
    attach(trainer, make(name))
    trainer.train()
    assert trainer.state.global_step == 2


# ---- It acts ----


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, kind in EVERYWHERE if not case(name).idle])
def test_acts(bench, name, kind):
    assert_acts(bench.whole(name, kind), bench.stock(kind, name), bench.shuffled(kind, name))


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, kind in EVERYWHERE if case(name).idle])
def test_idle_methods_are_stock_bit_for_bit(bench, name, kind):
    assert_idle(bench.whole(name, kind), bench.stock(kind, name))


@pytest.mark.parametrize("name", list(GUISES))
def test_what_was_left_out_has_the_number_that_decided(bench, name):
    run = bench.whole(name, first_kind(name))
    assert_says_why(run)


# ---- It costs what its card says ----


@pytest.mark.parametrize(("name", "kind"), EVERYWHERE)
def test_the_card_says_what_the_run_adds(bench, name, kind):
    finished = bench.whole(name, kind)
    selection = finished.trainer.selection
    method, run = selection.methods.methods[0], selection.run
    candidates = selection.metrics_window.candidates
    expected = method.expected_cost(run, candidate=candidates)
    counted = {what: finished.costs.get(what, 0) for what in WORK if what != "prompts"}
    for what, count in counted.items():
        least, most = expected.get(what, (0.0, 0.0))
        assert least <= count <= most, f"{what}: the card says {least:g} to {most:g}, the run counted {count}"
        assert (finished.costs.get(WORK[what], 0) > 0) == (count > 0 and what != "rewards"), WORK[what]
    if candidates:
        trained = selection.metrics_window.trained
        # The last candidates of an epoch are too few for a whole batch.
        rest = run.epochs * run.arguments.per_device_train_batch_size * method.candidates
        assert method.candidates * trained - rest <= candidates <= method.candidates * trained


# ---- It resumes ----


def resumed(bench, name, kind, epoch, workers):
    whole = bench.whole(name, kind, workers)
    trainer, witness = bench.attached(name, kind, output_dir=whole.output_dir, **loading(workers))
    trainer.train(resume_from_checkpoint=str(whole.checkpoint(epoch)))
    trace = tiny.Trace.of(trainer, witness)
    assert len(trace.ids) == len(whole.trace.ids) - whole.saved[epoch]
    return trace, whole.trace


@pytest.mark.parametrize(("name", "kind"), EVERYWHERE)
def test_resumed_inside_the_second_epoch(bench, name, kind):
    trace, whole = resumed(bench, name, kind, epoch=1, workers=0)
    trace.assert_ends_as(whole)


@pytest.mark.parametrize("name", METHODS)
def test_resumed_inside_the_first_epoch_with_loader_workers(bench, name):
    trace, whole = resumed(bench, name, kinds(name)[-1], epoch=0, workers=2)
    trace.assert_ends_as(whole)


@pytest.mark.parametrize("name", METHODS)
def test_a_changed_dataset_is_not_resumed(bench, name):
    kind = first_kind(name)
    whole = bench.whole(name, kind)
    checkpoint = whole.checkpoint(1)
    before = {path: path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()}
    column = {"dpo": "chosen", "sft": "completion"}[kind]
    rows = data(name, kind).to_list()
    rows[-1][column] += " w1"
    changed = Dataset.from_list(rows)
    trainer, witness = bench.attached(name, kind, dataset=changed, output_dir=whole.output_dir)
    with pytest.raises(ValueError, match=r"checkpoint-\d+ does not belong to this run.*dataset: saved"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert not witness.steps
    assert before == {path: path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()}


# ---- It plans once ----


def known(run, method):
    """All that a method and the ledger hold, as text that tells any two states apart."""
    arrays, values = run.ledger.state_dict()
    return {
        key: value.tobytes() if isinstance(value, np.ndarray) else repr(value)
        for key, value in {
            **arrays,
            "values": values,
            **{f"own {k}": v for k, v in method.state_dict().items()},
        }.items()
    }


def no_more_work(*args, **kwargs):
    pytest.fail("a pass, a generation or a helper run for a plan that was made already")


PLANNING = [name for name in GUISES if make(name).hooks & {"select", "order", "plan", "batch"}]


@pytest.mark.parametrize("name", PLANNING)
def test_asked_twice_for_one_plan_it_gives_the_same_and_works_once(bench, name, monkeypatch):
    """The length of an epoch is that of its first plan, so that one is asked for twice."""
    trainer = bench.trainer(first_kind(name), name)
    method = make(name)
    callback = attach(trainer, method)
    hook = "plan_batches" if "batch" in method.hooks else "plan"
    made, plan = [], getattr(callback.methods, hook)

    def asked_twice(run):
        first, first_mask = plan(run)
        state = known(run, method)
        with monkeypatch.context() as patch:
            patch.setattr(run, "generate", no_more_work)
            patch.setattr(run, "train_helper", no_more_work)
            patch.setattr(run.passes, "measure", no_more_work)
            patch.setattr(run.passes, "measure_tokens", no_more_work)
            second, second_mask = plan(run)
        assert [np.asarray(part).tolist() for part in second] == [np.asarray(part).tolist() for part in first]
        np.testing.assert_array_equal(second_mask, first_mask)
        assert known(run, method) == state
        made.append(len(first))
        return second, second_mask

    monkeypatch.setattr(callback.methods, hook, asked_twice)
    trainer.train()
    assert len(made) >= 2
    assert callback.ledger.visits.any()


# ---- It bears what data bring along ----


class KeepNothing(Method):
    """Drops every example."""

    name = "keep_nothing"
    packed_rows = True

    def select(self, run):
        return np.zeros(run.size, dtype=bool)


@pytest.mark.parametrize("name", METHODS)
def test_nothing_left_to_select_is_an_error(bench, name):
    trainer = bench.trainer(first_kind(name), name)
    attach(trainer, [make(name), KeepNothing()])
    with pytest.raises(ValueError, match=r"left to train on|would be kept"):
        trainer.train()
    assert trainer.state.global_step == 0


class Twice(Method):
    """Plans every example twice in a row."""

    name = "twice"
    packed_rows = True

    def plan(self, run, epoch):
        return np.repeat(run.plan_rng().permutation(run.size), 2)


@pytest.mark.parametrize("name", GUISES)
def test_repeated_ids(bench, name, monkeypatch):
    trainer = bench.trainer(first_kind(name), name, max_steps=3)
    method, witness = make(name), tiny.Witness()
    if method.hooks & {"select", "order", "plan", "batch"}:
        callback = attach(trainer, [method, witness])
        plan = callback.methods.plan

        def repeated(run):
            ids, kept = plan(run)
            return np.repeat(ids, 2), kept

        monkeypatch.setattr(callback.methods, "plan", repeated)
    else:
        attach(trainer, [method, Twice(), witness])
    trainer.train()
    trace = tiny.Trace.of(trainer, witness)
    assert_sound(trace)
    if case(name).repeats:
        assert trace.ledger["visits"].max() >= 2


@pytest.mark.parametrize("name", GUISES)
def test_unknown_scores_neither_win_nor_spread(bench, name):
    """Every fourth value of every numeric column is missing, and so is every fourth score of the method."""
    run, gaps = bench.gappy(first_kind(name), make(name), name)
    assert_sound(run.trace)
    if gaps.used and not case(name).untold:
        assert_unknown_displaces_nothing(run)


# ---- It goes away ----


@pytest.mark.parametrize("name", METHODS)
def test_detached_after_a_step_the_trainer_is_stock(bench, name):
    kind = first_kind(name)
    trainer = bench.trainer(kind, name, learning_rate=0.0, weight_decay=0.0)
    stock_class, dataset = type(trainer), trainer.train_dataset
    model = base_model(trainer)
    forward, callbacks = model.__dict__.get("forward"), list(trainer.callback_handler.callbacks)
    callback = attach(trainer, make(name))
    trainer.args.max_steps = 1
    trainer.train()
    callback.detach()

    assert type(trainer) is stock_class
    assert not hasattr(trainer, "selection")
    assert model.__dict__.get("forward") is forward
    assert trainer.train_dataset is dataset
    assert trainer.callback_handler.callbacks == callbacks
    assert not any(module._forward_hooks or module._backward_hooks for module in trainer.model.modules())
    if getattr(trainer, "ref_model", None) is not None:
        assert not any(module._forward_hooks for module in trainer.ref_model.modules())

    trainer.args.max_steps, trainer.args.learning_rate = -1, tiny.COMMON["learning_rate"]
    trainer.optimizer = trainer.lr_scheduler = None
    trainer._total_train_tokens = 0
    set_seed(trainer.args.seed)
    trainer.train()
    stock = bench.stock(kind, name, weight_decay=0.0)
    assert tiny.losses_of(trainer) == stock.losses
    tiny.assert_same_weights(tiny.weights_of(trainer), stock.weights)


# ---- Two processes ----


@pytest.fixture(scope="module")
def two_processes(bench, tmp_path_factory):
    """One run of every method in two processes, all in one launch; gives the folder of their traces."""
    folder = tmp_path_factory.mktemp("two")
    specs = []
    for name in GUISES:
        own = case(name)
        specs.append(
            {
                "kind": first_kind(name),
                "methods": [[name.split(":")[0], own.parameters]],
                "size": own.size,
                "world": 2,
                "model": str(bench.model),
                "output_dir": str(folder / name),
                "trace": str(folder / f"{name}.trace"),
                "log": str(folder / f"{name}.log"),
                "config": {**CONFIG, **own.config, "per_device_train_batch_size": 1},
            }
        )
    (ended,) = launched(folder, [specs])
    return SimpleNamespace(folder=folder, ended=dict(zip(GUISES, ended, strict=True)))


# What one step of Adam has made of gradients that are all but zero is rounding, by which products are divided.
ROUNDED = {("inrun_shapley:weight", "inrun_shapley_product")}


@pytest.mark.parametrize("name", GUISES)
def test_two_processes_choose_what_one_chooses(bench, two_processes, name):
    log = "".join((two_processes.folder / f"{name}.log.{rank}").read_text()[-2000:] for rank in range(2))
    assert two_processes.ended[name] == [0, 0], log
    two = torch.load(two_processes.folder / f"{name}.trace", weights_only=False)
    run = bench.whole(name, first_kind(name))
    one = run.trace
    if "batch" in run.trainer.selection.methods.methods[0].hooks:
        # Batches of varying size are dealt out to the processes: the same examples, in other steps.
        np.testing.assert_array_equal(one.ledger["visits"] > 0, two.ledger["visits"] > 0)
        return
    compared = 0
    for mine, theirs, values, other in zip(one.ids, two.ids, one.values, two.values, strict=True):
        if len(mine) != len(theirs):
            # The last batch of an epoch is short: two processes fill it up with a repeated row.
            break
        order, other_order = np.argsort(mine, kind="stable"), np.argsort(theirs, kind="stable")
        assert np.asarray(mine)[order].tolist() == np.asarray(theirs)[other_order].tolist()
        assert values.keys() == other.keys()
        for key in values:
            atol = 1e-3 * np.abs(values[key]).max() if (name, key) in ROUNDED else 1e-4
            np.testing.assert_allclose(values[key][order], other[key][other_order], rtol=2e-3, atol=atol, err_msg=key)
        compared += 1
    assert compared >= 2


def test_the_suite_covers_the_registry():
    assert set(METHODS) <= set(GUISES)
    assert {name for name, _ in EVERYWHERE} == set(GUISES)
    assert {name for name, _ in NEUTRAL} >= {"uniform"}
