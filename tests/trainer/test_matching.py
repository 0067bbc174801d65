"""Rows and ids stay together, whatever the user's collator does; what cannot be matched is refused by name."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from trl import DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from dsel_trl import SelectionCallback
from dsel_trl.data.rows import Layout
from dsel_trl.trainer.matching import in_order, is_trusted, matched, per_example, per_row
from tests import tiny
from tests.weighted import half_weighted

PAIRS, SEQUENCES = Layout(("chosen", "rejected"), prompts=True), Layout()


def width(row, kind):
    return len(row["chosen_ids"] if kind == "dpo" else row["input_ids"])


class Around:
    """A collator of the user's around the trainer's own."""

    def __init__(self, collator, kind):
        self.collator, self.kind = collator, kind


class Sorting(Around):
    def __call__(self, rows):
        return self.collator(sorted(rows, key=lambda row: width(row, self.kind), reverse=True))


class Dropping(Around):
    """Leaves out the shortest row of a batch."""

    def __call__(self, rows):
        shortest = min(range(len(rows)), key=lambda i: width(rows[i], self.kind))
        return self.collator([row for i, row in enumerate(rows) if i != shortest])


class PadsEveryKey(Around):
    """Fails on a key whose values are no lists of numbers."""

    def __call__(self, rows):
        for row in rows:
            for key, value in row.items():
                assert isinstance(value, list), f"{key} cannot be padded"
        return self.collator(rows)


class Noisy(Around):
    """Replaces tokens, so that no row is what it was."""

    def __call__(self, rows):
        batch = self.collator(rows)
        batch["input_ids"] = batch["input_ids"].clone()
        batch["input_ids"][:, 0] = 7
        return batch


def run(make_trainer, kind, around, dataset, method="weight_column", **parameters):
    trainer = make_trainer(kind, dataset=dataset, max_steps=3, per_device_train_batch_size=4, optim="sgd")
    trainer.data_collator = around(trainer.data_collator, kind)
    witness = tiny.Witness()
    parameters = parameters or {"normalize": "none"} if method == "weight_column" else parameters
    callback = SelectionCallback(trainer, [tiny_method(method, **parameters), witness])
    trainer.add_callback(callback)
    trainer.train()
    return trainer, witness


def tiny_method(name, **parameters):
    from dsel_trl import create_method

    return create_method(name, **parameters)


@pytest.mark.parametrize("around", [Sorting, Dropping, PadsEveryKey])
@pytest.mark.parametrize("kind", ["dpo", "sft"])
def test_rows_of_weight_zero_do_not_matter(make_trainer, kind, around):
    """Sorting is by the length of the chosen response or the whole row, which swapping the words leaves as it is."""
    weights = []
    for swapped in (False, True):
        trainer, witness = run(make_trainer, kind, around, half_weighted(kind, swapped))
        weights.append(tiny.weights_of(trainer))
        for step in witness.steps:
            np.testing.assert_array_equal(step.values["weight"], step.ids % 2)
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", ["dpo", "sft"])
def test_a_batch_without_some_rows_has_the_ids_of_the_others(make_trainer, kind):
    trainer, witness = run(make_trainer, kind, Dropping, tiny.DATASETS[kind](16))
    assert [len(ids) for ids in witness.ids] == [3, 3, 3]
    assert trainer.selection.ledger.visits.sum() == 9


@pytest.mark.parametrize("kind", ["dpo", "sft"])
def test_passes_measure_the_rows_that_were_asked_for(make_trainer, kind):
    measured = []
    for around in (None, Sorting):
        trainer = make_trainer(kind, dataset=tiny.DATASETS[kind](16))
        tiny.stir(trainer)
        if around is not None:
            trainer.data_collator = around(trainer.data_collator, kind)
        callback = SelectionCallback(trainer, "random")
        measured.append(callback.run.passes.measure(lambda batch: batch.loss))
    np.testing.assert_allclose(measured[0], measured[1], rtol=1e-5)


def test_rows_that_are_left_out_cannot_be_measured(make_trainer):
    trainer = make_trainer("dpo")
    trainer.data_collator = Dropping(trainer.data_collator, "dpo")
    callback = SelectionCallback(trainer, "random")
    with pytest.raises(ValueError, match=r"Dropping leaves examples out"):
        callback.run.passes.measure(lambda batch: batch.loss)


@pytest.mark.parametrize("method", ["weight_column", "random"])
def test_rows_that_cannot_be_told_apart_are_refused(make_trainer, method):
    with pytest.raises(ValueError, match=r"collator Noisy gives rows whose tokens are those of none"):
        run(make_trainer, "dpo", Noisy, half_weighted("dpo"), method)


def test_rows_that_the_collator_tokenizes_are_matched(make_trainer):
    """Rows hold text; the collator sorts and tokenizes them: each is collated alone to know it again."""
    trainer = make_trainer("sft")
    tokenizer, collate = trainer.processing_class, trainer.data_collator

    def collator(rows):
        rows = sorted(rows, key=lambda row: row["text"])
        ids = [tokenizer(row["text"])["input_ids"] for row in rows]
        return collate([{"input_ids": row, "labels": row} for row in ids])

    rows = [{"text": "w3 w4"}, {"text": "w1 w2 w5"}, {"text": "w2"}]
    assert matched(collator(rows), rows, SEQUENCES, collator) == [1, 2, 0]


# ---- The functions ----


def pair(*tokens):
    return {"prompt_ids": [1, 2], "chosen_ids": [*tokens], "rejected_ids": [*tokens[::-1], 9]}


def test_in_order_gives_the_rows_that_were_asked_for():
    batch = {"input_ids": torch.arange(12).view(6, 2), "ref_chosen_logps": torch.arange(3.0), "name": "x"}
    # The batch holds the rows 2, 0, 1.
    found = in_order(batch, [2, 0, 1], PAIRS)
    assert found["input_ids"][:, 0].tolist() == [2, 4, 0, 8, 10, 6]
    assert found["ref_chosen_logps"].tolist() == [1.0, 2.0, 0.0]
    assert found["name"] == "x"
    assert in_order(batch, [0, 1, 2], PAIRS) is batch


def test_equal_rows_are_matched_in_their_order():
    rows = [pair(3, 4), pair(3, 4), pair(5, 6)]
    collator = Sorting(DataCollatorForPreference(pad_token_id=0), "dpo")
    assert matched(collator(rows), rows, PAIRS, collator) == [0, 1, 2]


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_truncated_rows_are_matched(mode):
    rows = [pair(3, 4, 5, 6), pair(7, 8), pair(5, 6, 7)]
    collator = Sorting(DataCollatorForPreference(pad_token_id=0, max_length=4, truncation_mode=mode), "dpo")
    assert matched(collator(rows), rows, PAIRS, collator) == [0, 2, 1]


@pytest.mark.parametrize(("layout", "rows"), [(SEQUENCES, 3), (PAIRS, 6), (SEQUENCES, 1)])
def test_values_of_examples_go_with_their_rows(layout, rows):
    laid = per_row(torch.tensor([5, 6, 7]), rows)
    assert len(laid) == rows
    assert per_example(laid, layout).tolist() == [5, 6, 7]


@pytest.mark.parametrize("values", [[5, 6, 7, 8], [5], [5, 6, 5]])
def test_pairs_that_were_torn_apart_are_noticed(values):
    with pytest.raises(ValueError, match=r"not those of the same examples.*dispatch_batches"):
        per_example(torch.tensor(values), PAIRS)


class Torn(DPOTrainer):
    """As though a process had got the chosen rows of some pairs, and the rejected rows of others."""

    def _prepare_inputs(self, inputs):
        return super()._prepare_inputs({**inputs, "example_id": torch.arange(len(inputs["input_ids"]))})


@pytest.mark.parametrize("method", ["uniform", "weight_column"])
def test_pairs_that_were_torn_apart_stop_what_reads_them(make_trainer, method):
    trainer = make_trainer("dpo", max_steps=1)
    trainer.__class__ = Torn
    trainer.add_callback(SelectionCallback(trainer, method))
    if method == "uniform":
        trainer.train()
        assert trainer.selection.ledger.visits.sum() == 0
    else:
        with pytest.raises(ValueError, match="not those of the same examples"):
            trainer.train()


def test_candidates_that_share_a_row_are_picked_as_those_that_do_not(make_trainer):
    picked = []
    for padding_free in (False, True):
        trainer = make_trainer("lm", max_steps=3, max_length=None, padding_free=padding_free)
        witness = tiny.attach(trainer, "select_k_of_b")
        trainer.train()
        picked.append([sorted(ids) for ids in witness.ids])
    assert picked[0] == picked[1]
    assert {len(ids) for ids in picked[0]} == {2}


def test_own_collators_are_not_trusted():
    own = DataCollatorForPreference(pad_token_id=0)
    assert is_trusted(own)
    assert not is_trusted(Sorting(own, "dpo"))
    assert not is_trusted(lambda rows: own(rows))


# ---- Ids are positions in the dataset that was passed ----


@pytest.mark.parametrize("view", [lambda rows: rows.select([9, 3, 7, 5]), lambda rows: rows.shuffle(seed=1)])
@pytest.mark.parametrize("prepared", [False, True])
def test_ids_are_positions_in_a_view(make_trainer, view, prepared):
    rows = tiny.preferences(16)
    if prepared:
        rows = make_trainer("dpo", dataset=rows).train_dataset
    rows = view(rows)
    trainer = make_trainer("dpo", dataset=rows, max_steps=1)
    trainer.add_callback(SelectionCallback(trainer, "uniform"))
    trainer.train()
    assert trainer.selection.run.rows.positions.tolist() == list(range(len(rows)))


@pytest.mark.parametrize("kind", ["dpo", "sft"])
def test_ids_are_positions_before_what_the_trainer_dropped(make_trainer, tmp_path, kind):
    rows = tiny.DATASETS[kind](12).to_list()
    for i in (0, 5):
        rows[i]["prompt"] = " ".join(["w1"] * 40)
    trainer = make_trainer(kind, dataset=Dataset.from_list(rows), max_length=32, max_steps=1)
    assert len(trainer.train_dataset) == 10
    trainer.add_callback(SelectionCallback(trainer, "uniform"))
    trainer.train()
    ledger = Dataset.from_parquet(str(tmp_path / "out" / "selection" / "ledger.parquet"))
    assert ledger["id"][:] == [1, 2, 3, 4, 6, 7, 8, 9, 10, 11]


@pytest.mark.parametrize("values", [["p", "q"] * 8, [None] * 16, [7] * 16])
def test_a_column_of_the_users_called_example_id_is_theirs(make_trainer, tmp_path, values):
    rows = tiny.preferences(16).add_column("example_id", values)
    trainer = make_trainer("dpo", dataset=rows, max_steps=1)
    trainer.add_callback(SelectionCallback(trainer, "random", keep=0.5))
    trainer.train()
    ledger = Dataset.from_parquet(str(tmp_path / "out" / "selection" / "ledger.parquet"))
    assert ledger["id"][:] == list(range(16))


@pytest.mark.parametrize("form", ["torch", "numpy"])
def test_long_rows_of_a_stream_are_told_apart_in_every_format(form):
    from dsel_trl.trainer.rows import content_id

    first, second = np.arange(2000), np.arange(2000)
    second[1000] = 7
    make = torch.from_numpy if form == "torch" else np.asarray
    ids = {content_id({"input_ids": make(tokens)}) for tokens in (first, second)}
    assert len(ids) == 2
    assert content_id({"input_ids": make(first)}) == content_id({"input_ids": first.tolist()})
