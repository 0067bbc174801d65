"""The callback: columns, lengths, streams, composition, logging, and what a method sees of a run."""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from datasets import Dataset

from dsel_trl import Method, SelectionCallback, create_method
from dsel_trl.functional.ranking import keep_count
from tests import tiny, weighted


def trained(trainer, methods, **parameters):
    callback = SelectionCallback(trainer, methods, **parameters)
    trainer.add_callback(callback)
    trainer.train()
    return callback


# ---- Ways to say what to do ----


@pytest.mark.parametrize(
    "method",
    ["random", ["random"], create_method("random"), [create_method("random")]],
    ids=["name", "names", "object", "list"],
)
def test_a_method_by_name_object_or_list(make_trainer, method):
    callback = SelectionCallback(make_trainer("dpo"), method)
    assert [m.describe() for m in callback.methods.methods] == [{"name": "random", "keep": 0.5, "refresh": "never"}]


def test_parameters_go_to_the_named_method(make_trainer):
    assert SelectionCallback(make_trainer("dpo"), "random", keep=0.25).methods.methods[0].keep == 0.25


def test_training_works_without_adding_the_callback(make_trainer):
    trainer = make_trainer("dpo", max_steps=1)
    callback = SelectionCallback(trainer, "uniform")
    trainer.train()
    assert callback.ledger.visits.sum() == 2
    assert trainer.callback_handler.callbacks.count(callback) == 1


# ---- What the ledger hears ----


def test_a_callback_that_was_added_twice_acts_once(make_trainer):
    runs = []
    for times in (1, 2):
        trainer = make_trainer("dpo", num_train_epochs=2)
        callback = SelectionCallback(trainer, "margin", keep=0.5)
        for _ in range(times):
            trainer.add_callback(callback)
        trainer.train()
        assert trainer.callback_handler.callbacks.count(callback) == 1
        runs.append((callback.ledger.visits.tolist(), tiny.weights_of(trainer)))
    (once, weights), (twice, others) = runs
    assert once == twice
    tiny.assert_same_weights(weights, others)


def test_a_callback_of_another_trainer_is_refused_before_the_first_step(make_trainer):
    callback, other = SelectionCallback(make_trainer("sft"), "uniform"), make_trainer("sft")
    other.add_callback(callback)
    with pytest.raises(ValueError, match="made for another trainer than the one it was added to"):
        other.train()
    assert other.state.global_step == 0


def test_every_trained_example_is_in_the_ledger(make_trainer):
    trainer = make_trainer("dpo", dataset=tiny.preferences(9), num_train_epochs=2)
    witness = tiny.attach(trainer, "uniform")
    trainer.train()
    ledger = trainer.selection.ledger
    assert ledger.visits.tolist() == [2] * 9
    for step, record in enumerate(witness.steps, start=1):
        later = set().union(*(one.ids.tolist() for one in witness.steps[step:]))
        for id_, loss in zip(record.ids.tolist(), record.values["loss"], strict=True):
            if id_ not in later:
                assert ledger["loss"][id_] == loss
                assert ledger.steps("loss")[id_] == step


def test_what_is_logged(make_trainer):
    trainer = make_trainer("dpo", max_steps=4, logging_steps=2)
    trained(trainer, [create_method("random", keep=0.5), create_method("weight_column")])
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert len(rows) == 2
    for row in rows:
        assert row["selection/kept_fraction"] == 0.5
        assert row["selection/examples_skipped"] == 20
        assert row["selection/tokens_skipped"] > 0
        assert row["selection/weight_mean"] == pytest.approx(1.0, rel=1e-5)
        assert 0 < row["selection/effective_sample_size"] <= 2
        assert row["selection/weighted_loss"] != row["loss"]
        assert row["selection/sampler_lag"] == 2
    assert len(trainer.selection.metrics_window.history) == 2


@dataclass
class Follows(Method):
    """Writes down what it is told of the run."""

    seen: list = field(default_factory=list, init=False)

    name = "follows"

    def setup(self, run):
        self.before = (run.epoch, run.step, run.size, run.resumed, run.trainer)

    def score(self, batch):
        self.seen.append(batch.progress)
        return batch.loss

    def observe(self, run, step):
        run.log({"seen": float(run.step)})
        self.now = (run.epoch, run.step, run.max_steps, run.progress)


def test_a_method_is_told_where_the_run_is(make_trainer):
    trainer = make_trainer("sft", dataset=tiny.completions(8), num_train_epochs=2, gradient_accumulation_steps=2)
    method = Follows()
    trained(trainer, method)
    assert method.before == (0, 0, 8, False, "sft")
    assert method.now == (1, 4, 4, 1.0)
    assert method.seen == [0.0, 0.0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75]
    assert [row["selection/seen"] for row in trainer.state.log_history if "loss" in row] == [1.0, 2.0, 3.0, 4.0]


@dataclass
class Begins(Method):
    """Measures all examples when training begins, and writes down in which order it was called."""

    called: list = field(default_factory=list, init=False)

    name = "begins"

    def setup(self, run):
        self.called.append("setup")

    def load_state_dict(self, state):
        self.called.append("load_state_dict")

    def begin(self, run):
        self.called.append("begin")
        self.where = (run.epoch, run.step, run.max_steps, run.resumed)
        self.losses = run.passes.measure(lambda batch: batch.loss)
        run.ledger.write(self.name, None, self.losses, run.step)

    def epoch_size(self, run):
        self.called.append("epoch_size")
        return run.size

    def order(self, run, ids):
        self.called.append("order")
        return ids[np.argsort(-run.ledger[self.name][ids], kind="stable")]


def test_training_begins_after_setup_and_before_the_first_plan(make_trainer):
    trainer = make_trainer("sft", dataset=tiny.completions(8), num_train_epochs=2)
    method, witness = Begins(), tiny.Witness()
    trained(trainer, [method, witness])
    assert method.called == ["setup", "epoch_size", "begin", "order", "order"]
    assert method.where == (0, 0, 8, False)
    assert np.concatenate(witness.ids[:4]).tolist() == np.argsort(-method.losses, kind="stable").tolist()


def test_training_begins_again_on_a_resume_with_the_model_of_the_checkpoint(make_trainer, tmp_path):
    config = {"dataset": tiny.completions(8), "output_dir": tmp_path, "save_strategy": "steps", "save_steps": 3}
    first = make_trainer("sft", **config)
    callback = trained(first, Begins())
    losses = first.selection.run.passes.measure(lambda batch: batch.loss)
    first.save_model(tmp_path / "checkpoint-3")
    method = Begins()
    second = make_trainer("sft", **config)
    second.add_callback(SelectionCallback(second, method))
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert method.called == ["setup", "load_state_dict", "begin"]
    assert method.where == (0, 3, 4, True)
    np.testing.assert_array_equal(method.losses, losses)
    assert not np.array_equal(callback.methods.methods[0].losses, losses)


def test_draws_are_keyed_and_leave_the_global_generators_alone(make_trainer):
    run = SelectionCallback(make_trainer("dpo", seed=5), "uniform").run
    assert run.rng("a", 1).random() == run.rng("a", 1).random() != run.rng("b", 1).random()
    other = SelectionCallback(make_trainer("dpo", seed=5, data_seed=6), "uniform").run
    assert other.seed == 6
    assert other.rng("a", 1).random() != run.rng("a", 1).random()


def test_attaching_and_planning_draw_nothing_from_the_global_generators(make_trainer):
    trainer = make_trainer("dpo")
    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    callback = SelectionCallback(trainer, "random", keep=0.5)
    callback.begin_run(None)
    list(callback.serving.make_sampler())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()  # noqa: NPY002


# ---- Columns and lengths ----


def test_columns_reach_the_batch_by_id(make_trainer):
    @dataclass
    class Reads(Method):
        """Reads a column."""

        rows: list = field(default_factory=list, init=False)

        name = "reads"
        columns = ("difficulty",)

        def score(self, batch):
            self.rows += zip(batch.ids.tolist(), batch.column("difficulty").tolist(), strict=True)
            return batch.column("difficulty")

    trainer, method = make_trainer("sft", max_steps=3), Reads()
    callback = trained(trainer, method)
    column = tiny.completions()["difficulty"][:]
    assert len(method.rows) == 6
    for id_, value in method.rows:
        assert value == pytest.approx(column[id_], rel=1e-6)
        assert callback.ledger["reads"][id_] == np.float32(value)
    np.testing.assert_allclose(callback.run.column("difficulty"), column)
    with pytest.raises(ValueError, match="truth_flipped"):
        callback.run.column("truth_flipped")


@pytest.mark.parametrize("max_length", [64, 10, 7])
def test_lengths_of_pairs_are_those_that_are_trained(make_trainer, max_length):
    trainer = make_trainer("dpo", max_length=max_length, max_steps=3, per_device_train_batch_size=4)
    witness = tiny.attach(trainer, "uniform")
    trainer.train()
    run = trainer.selection.run
    completions = {}
    for id_ in range(run.size):
        row = trainer.train_dataset[id_]
        sides = [row["prompt_ids"] + row[side] for side in ("chosen_ids", "rejected_ids")]
        completions[id_] = sum(max(min(len(s), max_length) - len(row["prompt_ids"]), 0) for s in sides)
    assert run.completion_lengths.tolist() == list(completions.values())
    for step in witness.steps:
        assert run.lengths[step.ids].tolist() == step.values["length"].astype(int).tolist()


def test_lengths_of_conversations_count_what_carries_loss(make_trainer):
    trainer = make_trainer("sft", max_steps=3)
    witness = tiny.attach(trainer, "uniform")
    trainer.train()
    run = trainer.selection.run
    for step in witness.steps:
        assert run.completion_lengths[step.ids].tolist() == step.values["length"].astype(int).tolist()
    assert (run.lengths > run.completion_lengths).all()


# ---- Weights ----


@pytest.mark.parametrize("kind", ["dpo", "sft"])
def test_a_weight_of_zero_is_leaving_out(make_trainer, kind):
    """With weight 0 for half of a batch and no normalisation, the step is that of the other half at half size."""
    weights = np.zeros(40, dtype=np.float32)
    weights[:20] = 1.0
    trainer = make_trainer(kind, max_steps=3, learning_rate=0.0)
    callback = trained(trainer, weighted.FixedWeights(weights))
    assert set(callback.ledger["weight"][callback.ledger.visits > 0]) <= {0.0, 1.0}


def test_unknown_and_infinite_weights_count_as_zero(make_trainer):
    weights = np.ones(40, dtype=np.float32)
    weights[::3], weights[1::3] = np.nan, np.inf
    callback = trained(make_trainer("dpo", max_steps=4), weighted.FixedWeights(weights))
    seen = np.flatnonzero(callback.ledger.visits)
    np.testing.assert_array_equal(callback.ledger["weight"][seen], (seen % 3 == 2).astype(np.float32))


def test_weights_of_two_methods_multiply(make_trainer):
    @dataclass
    class Halves(Method):
        """Weight one half everywhere."""

        name = "halves"
        normalize = "none"

        def weigh(self, batch):
            return torch.full((batch.size,), 0.5)

    callback = trained(make_trainer("dpo", max_steps=4), [weighted.FixedWeights(weighted.WEIGHTS), Halves()])
    seen = callback.ledger.visits > 0
    np.testing.assert_allclose(callback.ledger["weight"][seen], 0.5 * weighted.WEIGHTS[seen], rtol=1e-6)


@pytest.mark.parametrize("steps", [1, 2])
def test_normalised_weights_average_one_in_each_step(make_trainer, steps):
    trainer = make_trainer("dpo", max_steps=3, gradient_accumulation_steps=steps)
    method, witness = weighted.FixedWeights(weighted.WEIGHTS, "mean1"), tiny.Witness()
    trained(trainer, [method, witness])
    for step in witness.steps:
        assert step.values["weight"].mean() == pytest.approx(1.0, rel=1e-5)
        plain = weighted.WEIGHTS[step.ids]
        np.testing.assert_allclose(step.values["weight"], plain / plain.mean(), rtol=1e-5)


# ---- Several methods ----


def test_kept_sets_intersect_and_say_why(make_trainer):
    @dataclass
    class Even(Method):
        """Keeps even ids."""

        name = "even"

        def select(self, run):
            return np.arange(run.size) % 2 == 0

    trainer = make_trainer("dpo", num_train_epochs=1)
    callback = trained(trainer, [Even(), create_method("random", keep=0.5)])
    trained_ids = np.flatnonzero(callback.ledger.visits)
    assert len(trained_ids)
    assert (trained_ids % 2 == 0).all()
    table = callback.ledger.to_dataset().to_pandas()
    assert (table.loc[1::2, "dropped_by"] == "even").all()
    assert set(table.loc[::2, "dropped_by"]) == {"", "random"}
    assert (table.loc[table["dropped_by"] != "", "visits"] == 0).all()
    # The epoch is as long as what both keep.
    assert (
        len(trained_ids) == (table["dropped_by"] == "").sum() == trainer.state.global_step * 2 - (len(trained_ids) % 2)
    )


@pytest.mark.parametrize("keep", [0.1, 0.33, 1.0])
def test_the_epoch_is_as_long_as_what_is_kept(make_trainer, keep):
    trainer = make_trainer("dpo", num_train_epochs=2)
    callback = trained(trainer, "random", keep=keep)
    size = keep_count(keep, 40)
    assert trainer.state.max_steps == 2 * -(-size // 2)
    assert callback.ledger.visits.sum() == 2 * size
    assert (callback.ledger.visits > 0).sum() == size


# ---- Streams ----


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_is_weighed_by_its_columns(make_trainer, workers):
    rows = tiny.completions(8)
    stream = rows.to_iterable_dataset(num_shards=2)
    trainer = make_trainer("sft", dataset=stream, max_steps=8, dataloader_num_workers=workers)
    witness = tiny.attach(trainer, "weight_column", normalize="none")
    trainer.train()
    ledger = trainer.selection.ledger
    # Two passes over the stream: the same content has the same id.
    assert len(ledger) == 8
    assert ledger.visits[:8].tolist() == [2] * 8
    table = ledger.to_dataset().to_pandas()
    np.testing.assert_allclose(sorted(table["weight"]), sorted(rows["weight"]), rtol=1e-6)
    first = sorted(id_ for ids in witness.ids[:4] for id_ in ids)
    assert first == sorted(id_ for ids in witness.ids[4:] for id_ in ids) == sorted(table["id"])


def test_a_stream_with_a_neutral_method_is_stock(make_trainer):
    def run(method):
        trainer = make_trainer("sft", dataset=tiny.completions(10).to_iterable_dataset(), max_steps=6)
        if method:
            SelectionCallback(trainer, method)
        trainer.train()
        return tiny.losses_of(trainer), tiny.weights_of(trainer)

    stock, mine = run(None), run("uniform")
    assert mine[0] == stock[0]
    tiny.assert_same_weights(mine[1], stock[1])


def test_a_stream_of_pairs(make_trainer):
    trainer = make_trainer("dpo", dataset=tiny.preferences(8).to_iterable_dataset(), max_steps=4)
    callback = trained(trainer, [create_method("weight_column"), create_method("robust_dpo", warmup=0.0)])
    assert len(callback.ledger) == 8
    assert np.isfinite(callback.ledger["implicit_margin"]).all()
    assert len(set(callback.ledger.to_dataset()["id"][:])) == 8


def test_a_stream_stopped_and_resumed(make_trainer):
    def make():
        stream = tiny.completions(12).to_iterable_dataset()
        trainer = make_trainer("sft", dataset=stream, max_steps=8, save_strategy="steps", save_steps=3)
        return trainer, tiny.attach(trainer, "weight_column")

    trainer, witness = make()
    trainer.train()
    whole = tiny.Trace.of(trainer, witness)
    trainer, witness = make()
    trainer.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-3")
    assert len(witness.ids) == 5
    tiny.Trace.of(trainer, witness).assert_ends_as(whole)


def test_columns_and_lengths_of_a_stream_are_not_known_in_advance(make_trainer):
    trainer = make_trainer("sft", dataset=tiny.completions(8).to_iterable_dataset(), max_steps=1)
    run = SelectionCallback(trainer, "uniform").run
    for read in (lambda: run.column("weight"), lambda: run.lengths, lambda: run.completion_lengths):
        with pytest.raises(ValueError, match="stream"):
            read()


def test_a_missing_value_of_a_stream_is_unknown(make_trainer):
    rows = tiny.preferences(4).to_list()
    rows[1]["score_chosen"] = None
    trainer = make_trainer("dpo", dataset=Dataset.from_list(rows).to_iterable_dataset(), max_steps=2)
    callback = trained(trainer, "margin", source="explicit", action="weight")
    weights = callback.ledger.to_dataset()["weight"][:]
    assert sorted(weights)[0] == 0.0
    assert sorted(weights)[1] > 0.0
