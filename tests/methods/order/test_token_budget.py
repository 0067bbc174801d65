"""Token budget in a trainer: budgets kept, orders followed, other methods served."""

import numpy as np
import pytest

from dsel_trl import SelectionCallback, create_method
from tests import tiny
from tests.functional.order.padding import padded_tokens
from tests.runs import make_run

LENGTHS = np.random.default_rng(0).lognormal(4, 1, size=5000).astype(np.int64) + 1


def planned(lengths=LENGTHS, ids=None, *, rows=1, world=1, batch_size=8, plans_made=0, method=None, **parameters):
    """The method, its run, and a plan."""
    method = method or create_method("token_budget", **parameters)
    method._lengths, method._rows = lengths, rows
    run = make_run(len(lengths), trainer="sft", epochs=4, world=world, plans_made=plans_made)
    run.arguments.per_device_train_batch_size = batch_size
    run.ordered = ids is not None
    return method, run, method.batch(run, np.arange(len(lengths)) if ids is None else ids)


@pytest.mark.parametrize("world", [1, 2, 8])
@pytest.mark.parametrize("rows", [1, 2])
def test_every_example_once_within_the_budget_on_every_rank(rows, world):
    _, _, batches = planned(rows=rows, world=world, tokens=4000)
    assert np.bincount(np.concatenate(batches)).tolist() == [1] * 5000
    too_long = np.array([len(batch) == 1 for batch in batches])
    cost = padded_tokens(batches, LENGTHS, rows_per_example=rows)
    assert (cost[~too_long] <= 4000).all()
    assert len(batches) % world == 0
    sizes = np.array([len(batch) for batch in batches]).reshape(-1, world)
    assert (sizes == sizes[:, :1]).all()
    # Like lengths side by side: no rank waits long for another.
    side_by_side = cost.reshape(-1, world)
    assert (side_by_side.min(axis=1) / side_by_side.max(axis=1)).mean() > 0.75


def test_hardly_any_padding_and_as_many_steps_as_before():
    _, _, batches = planned()
    assert LENGTHS.sum() / padded_tokens(batches, LENGTHS).sum() > 0.95
    assert len(batches) == pytest.approx(5000 / 8, rel=0.03)
    order = np.random.default_rng(0).permutation(5000).reshape(-1, 8)
    assert LENGTHS.sum() / padded_tokens(list(order), LENGTHS).sum() < 0.6


def test_all_passes_have_the_same_number_of_batches_and_differ():
    method, _, first = planned()
    plans = [first] + [planned(method=method, plans_made=i)[2] for i in (1, 2, 3)]
    assert len({len(plan) for plan in plans}) == 1
    for plan in plans:
        assert np.bincount(np.concatenate(plan)).tolist() == [1] * 5000
    batches = [{tuple(sorted(batch)) for batch in plan if len(batch) > 1} for plan in plans]
    assert len(batches[0] & batches[1]) < 0.05 * len(batches[0])


def test_plans_are_reproducible():
    first, second = planned()[2], planned()[2]
    assert all((a == b).all() for a, b in zip(first, second, strict=True))


def test_an_order_is_kept_at_large():
    ids = np.random.default_rng(1).permutation(5000)
    _, _, batches = planned(ids=ids, window=100)
    place = np.empty(5000, dtype=np.int64)
    place[ids] = np.arange(5000)
    windows = [set((place[batch] // 100).tolist()) for batch in batches]
    assert all(len(window) == 1 for window in windows)
    flat = [window.pop() for window in windows]
    assert flat == sorted(flat)
    # Inside a window the batches are shuffled: not all from long to short.
    heads = [LENGTHS[batch[0]] for batch, window in zip(batches, flat, strict=True) if window == 3]
    assert heads != sorted(heads, reverse=True)


def test_largest_number_of_examples():
    _, _, batches = planned(max_examples=4)
    assert max(map(len, batches)) == 4


@pytest.mark.parametrize("name", ["tokens", "window", "max_examples"])
def test_errors_name_the_value(name):
    with pytest.raises(ValueError, match=f"{name}=0"):
        create_method("token_budget", **{name: 0})
    with pytest.raises(ValueError, match="weighting='token'"):
        create_method("token_budget", weighting="token")


def test_two_planners_of_batches_are_refused(make_trainer):
    with pytest.raises(ValueError, match="form the batches"):
        SelectionCallback(make_trainer("sft"), ["token_budget", create_method("dataset_decomposition")])


def test_a_sampling_strategy_of_the_trainer_is_refused(make_trainer):
    with pytest.raises(ValueError, match="group_by_length"):
        SelectionCallback(make_trainer("sft", train_sampling_strategy="group_by_length"), "token_budget")


@pytest.mark.parametrize("other", ["random", "length_curriculum", "infobatch"])
def test_with_other_methods(make_trainer, other):
    rows = tiny.completions(160)
    trainer = make_trainer("sft", dataset=rows, num_train_epochs=3, per_device_train_batch_size=8)
    witness = tiny.Witness()
    trainer.add_callback(SelectionCallback(trainer, [create_method(other), create_method("token_budget"), witness]))
    trainer.train()
    visits = trainer.selection.ledger.visits
    if other == "random":
        assert sorted(set(visits.tolist())) == [0, 3]
        assert (visits == 3).sum() == 80
    elif other == "length_curriculum":
        assert visits.tolist() == [3] * 160
    else:
        # The epoch is as short as that method says, 147 of 160 on average, up to a batch: so steps are saved.
        assert 3 * (147 - 8) < visits.sum() < 3 * (147 + 8)


def test_a_weight_of_another_method_is_still_averaged_over_the_examples(make_trainer):
    trainer = make_trainer("dpo", gradient_accumulation_steps=2)
    witness = tiny.Witness()
    methods = [create_method("weight_column"), create_method("token_budget"), witness]
    trainer.add_callback(SelectionCallback(trainer, methods))
    trainer.train()
    for step in witness.steps:
        assert step.values["weight"].mean() == pytest.approx(1.0, rel=1e-5)
