"""Dataset decomposition in a trainer: pieces, buckets, curricula."""

from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset

from dsel_trl import SelectionCallback, create_method
from dsel_trl.data.build.documents import cut_documents, document_tokens
from dsel_trl.functional.order.dataset_decomposition import even_buckets
from dsel_trl.methods.order.dataset_decomposition import CURRICULA, fill_up
from tests import tiny
from tests.runs import make_run

LENGTHS = np.random.default_rng(0).lognormal(4.5, 0.9, size=6000).astype(np.int64).clip(1, 1024)
BUCKETS = {"min_log2": 5, "max_log2": 10}


def planned(*, lengths=LENGTHS, world=1, accumulation=1, batch_size=2, plans_made=0, trainer="sft", **parameters):
    """The steps of a plan, as lists of their micro-batches, and the method."""
    method = create_method("dataset_decomposition", **{**BUCKETS, **parameters})
    arguments = SimpleNamespace(
        per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation, max_length=1024
    )
    dataset = Dataset.from_dict({"input_ids": [[0] * n for n in lengths]})
    run = make_run(len(lengths), trainer=trainer, world=world, arguments=arguments, dataset=dataset)
    run.plans_made = plans_made
    method.check(run)
    batches = method.batch(run, np.arange(len(lengths)))
    parts = world * accumulation
    assert len(batches) % parts == 0
    return [batches[i : i + parts] for i in range(0, len(batches), parts)], method


def padded_log2(step):
    return int(np.ceil(np.log2(max(32, LENGTHS[np.concatenate(step)].max()))))


@pytest.mark.parametrize("construction", ["odds", "subcycle"])
@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (2, 1), (1, 4), (4, 2)])
def test_every_example_once_one_bucket_per_step_constant_tokens(construction, world, accumulation):
    steps, method = planned(world=world, accumulation=accumulation, construction=construction, cycles=3)
    assert np.bincount(np.concatenate([batch for step in steps for batch in step])).tolist() == [1] * 6000
    full = 0
    for step in steps:
        sizes = np.array([len(batch) for batch in step]).reshape(accumulation, world)
        assert sizes.min() >= 1
        assert (sizes == sizes[:, :1]).all()
        tokens = sizes.sum() * 2 ** padded_log2(step)
        assert tokens <= method._budget
        full += tokens == method._budget
    assert full > 0.9 * len(steps)


def test_nothing_is_dropped_unless_asked_for():
    dropped = {i for step in planned(drop_last=True)[0] for i in np.concatenate(step)}
    assert 0 < 6000 - len(dropped) < 6 * 64
    for step in planned(drop_last=True)[0]:
        assert len(np.concatenate(step)) * 2 ** padded_log2(step) == 2048


@pytest.mark.parametrize("curriculum", CURRICULA)
def test_lengths_follow_the_curriculum_in_every_cycle(curriculum):
    first, last = [], []
    for plan in range(3):
        steps, _ = planned(curriculum=curriculum, cycles=2, plans_made=plan)
        half = [padded_log2(step) for step in steps[: len(steps) // 2]]
        third = len(half) // 3
        first.append(np.mean(half[:third]))
        last.append(np.mean(half[-third:]))
    if curriculum.startswith("grow"):
        assert np.mean(first) < np.mean(last) - 0.3
    elif curriculum.startswith("shrink"):
        assert np.mean(first) > np.mean(last) + 0.3
    else:
        assert abs(np.mean(first) - np.mean(last)) < 0.3


def test_passes_differ_and_are_reproducible():
    flat = [[np.concatenate(step).tolist() for step in planned(plans_made=plan)[0]] for plan in (0, 0, 1)]
    assert flat[0] == flat[1]
    assert flat[0] != flat[2]
    assert len(flat[0]) == len(flat[2])


def test_buckets_are_made_even_from_below():
    rng = np.random.default_rng(3)
    lengths = rng.integers(1, 200, size=501)
    old = np.ceil(np.log2(lengths)).astype(np.int64)
    new = even_buckets(old, lengths, 8)
    assert (new >= old).all()
    counts = np.bincount(new)
    assert [count % 8 for count in counts[counts > 0][1:]] == [0] * (np.count_nonzero(counts) - 1)
    assert (new != old).sum() < 8 * len(np.unique(old))


def test_short_steps_are_filled_without_repeats_where_that_is_possible():
    steps = fill_up([np.arange(10), np.array([20, 21])], ranks=2, least=4)
    assert [step.tolist() for step in steps] == [[0, 1, 2, 3, 4, 5, 6, 7], [20, 21, 8, 9]]
    steps = fill_up([np.array([1]), np.array([2, 3, 4, 5])], ranks=2, least=4)
    assert [step.tolist() for step in steps] == [[1, 1, 1, 1], [2, 3, 4, 5]]


# ---- Documents ----


def documents(lengths):
    tokens = np.arange(int(np.sum(lengths))) + 10
    rows = [part.tolist() for part in np.split(tokens, np.cumsum(lengths)[:-1])]
    return Dataset.from_dict({"input_ids": rows, "labels": rows, "quality": [0.5 * i for i in range(len(rows))]})


@pytest.mark.parametrize("keep_tail", [True, False])
@pytest.mark.parametrize("random_cut", [True, False])
def test_pieces_put_together_are_the_documents(keep_tail, random_cut):
    lengths = np.random.default_rng(0).integers(1, 300, size=60)
    rows = documents(lengths)
    flat, ended = document_tokens(rows, SimpleNamespace(eos_token_id=1), "text", None)
    assert ended.tolist() == (lengths + 1).tolist()
    rng = np.random.default_rng(5) if random_cut else None
    pieces = cut_documents(rows, flat, ended, min_log2=3, max_log2=5, keep_tail=keep_tail, rng=rng)
    for i, row in enumerate(rows):
        whole = [*row["input_ids"], 1]
        mine = pieces.filter(lambda piece, i=i: piece["document_id"] == i)
        joined = [token for ids in mine["input_ids"] for token in ids]
        assert joined == whole[: len(joined)]
        sizes = [len(ids) for ids in mine["input_ids"]]
        powers = [size for size in sizes if size in (9, 17, 33)]
        if keep_tail:
            # A single last token predicts nothing.
            assert len(whole) - len(joined) <= 1
            assert sizes[: len(powers)] == powers
        else:
            assert len(whole) - len(joined) < 9
            assert sizes == powers
        assert set(mine["quality"]) <= {row["quality"]}
    assert pieces["labels"] == pieces["input_ids"]


@pytest.mark.parametrize("random_cut", [True, False])
def test_long_documents_leave_a_curriculum_at_the_defaults(make_trainer, random_cut):
    """Cut at random as the authors do, the longest bucket has half of the tokens at most, not nearly all of them."""
    rng = np.random.default_rng(2)
    texts = [" ".join(f"w{i}" for i in rng.integers(0, 40, size=int(size))) for size in rng.integers(70, 120, size=30)]
    trainer = make_trainer("lm", dataset=Dataset.from_dict({"text": texts}), max_length=None, max_steps=1)
    settings = {} if random_cut else {"random_cut": False}
    SelectionCallback(trainer, "dataset_decomposition", mode="decompose", min_log2=2, max_log2=4, **settings)
    trainer.train()
    sizes = np.array([len(ids) for ids in trainer.train_dataset["input_ids"]])
    share = sizes[sizes == 17].sum() / sizes.sum()
    assert share < 0.55 if random_cut else share > 0.8


def test_a_curriculum_of_one_length_is_told(make_trainer):
    trainer = make_trainer("sft", max_length=32, max_steps=1)
    callback = SelectionCallback(trainer, "dataset_decomposition", min_log2=5, max_log2=5)
    trainer.train()
    assert any("orders next to nothing" in note for note in callback.metrics_window.notes.values())


def test_truncated_tokens_are_read_from_the_text(make_trainer):
    totals = []
    for max_length in (None, 8):
        trainer = make_trainer("lm", max_length=max_length, max_steps=2)
        rows = trainer.train_dataset
        witness = tiny.attach(
            trainer, "dataset_decomposition", mode="decompose", min_log2=1, max_log2=3, curriculum="uniform"
        )
        trainer.train()
        totals.append(sum(map(len, trainer.train_dataset["input_ids"])))
        assert len(trainer.train_dataset) > len(rows)
        assert witness.ids
        trainer.selection.detach()
        assert trainer.train_dataset is rows
    assert totals[0] == totals[1]
    words = sum(len(text.split()) + 1 for text in tiny.texts()["text"])
    assert words - 40 <= totals[0] <= words


def test_no_token_sees_another_document_and_none_is_padded(make_trainer):
    """Every row of a batch is one piece, and full buckets have no padding at all."""
    trainer = make_trainer("lm", max_length=16)
    parameters = {"mode": "decompose", "min_log2": 1, "max_log2": 4, "keep_tail": False}
    trainer.add_callback(SelectionCallback(trainer, create_method("dataset_decomposition", **parameters)))
    padded, own = [], trainer.compute_loss

    def looking(model, inputs, *args, **kwargs):
        padded.append(bool((inputs["attention_mask"] == 0).any()))
        return own(model, inputs, *args, **kwargs)

    trainer.compute_loss = looking
    trainer.train()
    assert np.mean(padded) < 0.3


def test_what_cannot_be_cut_is_refused(make_trainer):
    for kind, match in (("sft", 'Use mode="bucket"'), ("dpo", 'for pairs use mode="bucket"')):
        trainer = make_trainer(kind)
        method = create_method("dataset_decomposition", mode="decompose", min_log2=2)
        trainer.add_callback(SelectionCallback(trainer, method))
        with pytest.raises(ValueError, match=match):
            trainer.train()
        assert trainer.state.global_step == 0


@pytest.mark.parametrize(
    ("parameters", "config", "match"),
    [
        ({}, {}, "min_log2=8 is longer than the longest bucket, 2\\*\\*6"),
        ({"min_log2": 2, "max_log2": 3}, {}, "max_length=8 to truncate them, drop_long=True"),
        ({"min_log2": 2, "tokens": 64}, {"gradient_accumulation_steps": 2}, "set it to at least 128"),
        ({"min_log2": 2, "mode": "decompose"}, {"max_length": 512}, "max_log2=7"),
    ],
)
def test_errors_before_the_first_step(make_trainer, parameters, config, match):
    trainer = make_trainer("lm", **config)
    trainer.add_callback(SelectionCallback(trainer, create_method("dataset_decomposition", **parameters)))
    with pytest.raises(ValueError, match=match):
        trainer.train()


def test_long_examples_are_dropped_where_asked(make_trainer):
    trainer = make_trainer("sft")
    long = np.array([len(ids) > 16 for ids in trainer.train_dataset["input_ids"]])
    witness = tiny.attach(trainer, "dataset_decomposition", min_log2=2, max_log2=4, drop_long=True)
    trainer.train()
    assert long.any()
    assert sorted(chain.from_iterable(witness.ids)) == np.flatnonzero(~long).tolist()


def test_it_orders_and_says_so(make_trainer):
    trainer = make_trainer("sft")
    methods = [create_method("dataset_decomposition", min_log2=2), create_method("length_curriculum")]
    trainer.add_callback(SelectionCallback(trainer, methods))
    with pytest.raises(ValueError, match="another method orders the examples"):
        trainer.train()


@pytest.mark.parametrize(
    "parameters",
    [{"mode": "pack"}, {"curriculum": "grow"}, {"construction": "subcycle", "curriculum": "uniform"}, {"cycles": 0}],
)
def test_parameters_are_checked(parameters):
    with pytest.raises(ValueError, match=str(next(reversed(parameters.values())))):
        create_method("dataset_decomposition", **parameters)
