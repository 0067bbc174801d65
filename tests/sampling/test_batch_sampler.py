"""Plans made of batches: what is served to whom, how often, and what a resumed run finds."""

import json
from itertools import chain

import numpy as np
import pytest
import torch

from dsel_trl import SelectionCallback, create_method
from dsel_trl.sampling.batch_sampler import BatchPlanSampler, over_ranks
from dsel_trl.trainer.rows import make_rows
from tests import tiny
from tests.distributed.launch import launched


def numbered(sizes):
    """A plan function whose k-th plan has `sizes[k]` batches of two fresh ids; it writes down how it was asked."""
    asked = []

    def plan(served, made):
        asked.append((served.tolist(), made))
        return [np.array([100 * made + 2 * i, 100 * made + 2 * i + 1]) for i in range(sizes[made])]

    return plan, asked


# ---- The sampler ----


def test_a_pass_goes_on_in_the_next_epoch():
    plan, asked = numbered([5, 3, 4])
    sampler = BatchPlanSampler(plan, length=4)
    first, second = list(sampler), list(sampler)
    assert first == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert second == [[8, 9], [100, 101], [102, 103], [104, 105]]
    # A new pass knows nothing of what the last one served in the same epoch.
    assert asked == [([], 0), ([], 1)]
    assert len(sampler) == 4


def test_a_short_pass_is_followed_by_another():
    plan, asked = numbered([2, 2, 2])
    assert list(BatchPlanSampler(plan, length=3)) == [[0, 1], [2, 3], [100, 101]]
    assert asked == [([], 0), ([], 1)]


def test_a_due_plan_replaces_the_rest_of_a_pass_at_an_optimizer_step():
    plan, asked = numbered([6, 2, 6])
    sampler = BatchPlanSampler(plan, length=6, accumulation=2)
    batches = iter(sampler)
    taken = [next(batches)]
    sampler.due = True
    taken += [next(batches) for _ in range(4)]
    assert taken == [[0, 1], [2, 3], [100, 101], [102, 103], [200, 201]]
    assert asked == [([], 0), ([0, 1, 2, 3], 1), ([], 2)]


def test_ranks_share_a_plan():
    for rank in (0, 1):
        plan, _ = numbered([6])
        sampler = BatchPlanSampler(plan, length=3, rank=rank, world=2)
        assert list(sampler) == [[4 * i + 2 * rank, 4 * i + 2 * rank + 1] for i in range(3)]
        assert sampler.history.tolist() == list(range(12))


def test_plans_that_cannot_be_served():
    with pytest.raises(ValueError, match="3 batches does not go evenly over 2"):
        list(BatchPlanSampler(lambda served, made: [np.array([0])] * 3, 2, world=2))
    with pytest.raises(ValueError, match="empty"):
        list(BatchPlanSampler(lambda served, made: [], 1))
    with pytest.raises(ValueError, match="epoch of 0 batches"):
        BatchPlanSampler(lambda served, made: [], 0)


@pytest.mark.parametrize("taken", [0, 1, 3, 4])
def test_state_is_taken_up_where_it_was_left(taken):
    sizes = [5, 3, 7]
    whole = BatchPlanSampler(numbered(sizes)[0], length=4)
    expected = [list(whole) for _ in range(3)]

    sampler = BatchPlanSampler(numbered(sizes)[0], length=4)
    first, second = list(sampler), iter(sampler)
    assert [first, [next(second) for _ in range(taken)]] == [expected[0], expected[1][:taken]]
    mid = taken in (1, 3)
    arrays, values = sampler.state_dict(mid_epoch=mid)
    values = json.loads(json.dumps(values))

    resumed = BatchPlanSampler(numbered(sizes)[0], length=4)
    resumed.load_state_dict(arrays, values, replay=True)
    # What was handed out in an unfinished epoch comes again, for the trainer to skip.
    rest = [list(resumed), list(resumed)] if taken < 4 else [None, list(resumed)]
    assert rest[1] == expected[2]
    assert rest[0] in (None, expected[1])


def test_state_of_another_epoch_length_is_refused():
    arrays, values = BatchPlanSampler(numbered([3])[0], 3).state_dict(mid_epoch=False)
    with pytest.raises(ValueError, match="made with 3 batches per epoch, this run has 2"):
        BatchPlanSampler(numbered([3])[0], 2).load_state_dict(arrays, values, replay=True)


def test_over_ranks():
    steps = [np.arange(5), np.array([7]), np.array([8, 9])]
    assert [ids.tolist() for ids in over_ranks(steps, 2)] == [[0, 1, 2], [3, 4, 0], [7], [7], [8], [9]]
    assert over_ranks(steps, 1)[1] is steps[1]


def test_lengths_a_batch_is_padded_to(make_trainer):
    trainer = make_trainer("dpo", max_length=9)
    rows = trainer.train_dataset
    expected = [min(9, len(r["prompt_ids"]) + max(len(r["chosen_ids"]), len(r["rejected_ids"]))) for r in rows]
    pairs = make_rows(trainer, rows, "train")
    assert pairs.padded_lengths.tolist() == expected
    assert pairs.layout.sequences == 2
    trainer = make_trainer("sft")
    sequences = make_rows(trainer, trainer.train_dataset, "train")
    assert sequences.padded_lengths.tolist() == [len(ids) for ids in trainer.train_dataset["input_ids"]]
    assert sequences.layout.sequences == 1


# ---- In the trainer ----

PLANNERS = {
    "budget": ["token_budget", {"window": 16}],
    "buckets": ["dataset_decomposition", {"mode": "bucket", "min_log2": 2, "max_log2": 5, "cycles": 2}],
}
CONFIG = {"num_train_epochs": 3, "gradient_accumulation_steps": 2, "lr_scheduler_type": "linear"}


@pytest.mark.parametrize("kind", ["dpo", "sft"])
@pytest.mark.parametrize("planner", PLANNERS)
def test_every_example_once_per_epoch_and_the_schedule_is_right(make_trainer, kind, planner):
    name, parameters = PLANNERS[planner]
    trainer = make_trainer(kind, **CONFIG)
    stock_class, rows = type(trainer), trainer.train_dataset
    witness = tiny.attach(trainer, name, **parameters)
    trainer.train()
    assert np.bincount(np.concatenate(witness.ids)).tolist() == [3] * 40
    steps = trainer.state.max_steps // 3
    for epoch in range(3):
        assert sorted(chain.from_iterable(witness.ids[epoch * steps : (epoch + 1) * steps])) == list(range(40))
    assert len({len(ids) for ids in witness.ids}) > 1
    rates = [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]
    assert rates[-1] == pytest.approx(5e-3 / trainer.state.max_steps)
    assert trainer.state.global_step == trainer.state.max_steps
    assert trainer.selection.ledger.visits.tolist() == [3] * 40
    trainer.selection.detach()
    assert type(trainer) is stock_class
    assert trainer.train_dataset is rows
    assert isinstance(trainer.get_train_dataloader().batch_sampler.sampler, torch.utils.data.RandomSampler)


@pytest.fixture(scope="module")
def runs(model, tmp_path_factory):
    """Folder with traces of undisturbed, killed and resumed runs, in one and in two processes."""
    folder = tmp_path_factory.mktemp("batched")
    chains = []
    for planner, method in PLANNERS.items():
        for kind, world, workers, kill in (("dpo", 1, 2, 8), ("dpo", 2, 0, 13), ("sft", 1, 0, 13), ("sft", 2, 2, 8)):
            name = f"{planner}-{kind}-{world}-{workers}"
            base = {
                "kind": kind,
                "methods": [method],
                "world": world,
                "size": 40,
                "model": str(model),
                "output_dir": str(folder / name),
                "log": str(folder / f"{name}.log"),
                "config": {
                    **CONFIG,
                    "per_device_train_batch_size": 2 // world,
                    "dataloader_num_workers": workers,
                    "save_strategy": "steps",
                    "save_steps": 3,
                },
            }
            chains.append([{**base, "trace": str(folder / f"{name}.trace")}])
            again = {**base, "output_dir": str(folder / f"{name}.again"), "log": str(folder / f"{name}.again.log")}
            killed = {"event": "on_substep_end", "count": kill, "rank": world - 1}
            resumed = {**again, "resume": True, "trace": str(folder / f"{name}.again.trace")}
            chains.append([{**again, "kill": killed}, resumed])
    launched(folder, chains)
    return folder


NAMES = [f"{p}-{run}" for p in PLANNERS for run in ("dpo-1-2", "dpo-2-0", "sft-1-0", "sft-2-2")]


def trace(folder, name):
    log = "".join(path.read_text()[-2000:] for path in folder.glob(f"{name}.log.*"))
    assert (folder / f"{name}.trace").exists(), log
    return torch.load(folder / f"{name}.trace", weights_only=False)


@pytest.mark.parametrize("name", NAMES)
def test_killed_and_resumed_equals_undisturbed(runs, name):
    alone, resumed = trace(runs, name), trace(runs, f"{name}.again")
    assert len(resumed.ids) < len(alone.ids)
    resumed.assert_ends_as(alone)


@pytest.mark.parametrize("name", NAMES)
def test_every_example_once_per_epoch_in_any_number_of_processes(runs, name):
    ids = trace(runs, name).ids
    steps = len(ids) // 3
    for epoch in range(3):
        assert sorted(chain.from_iterable(ids[epoch * steps : (epoch + 1) * steps])) == list(range(40))


@pytest.mark.parametrize("kind", ["dpo", "sft"])
def test_buckets_are_the_same_steps_in_any_number_of_processes(runs, kind):
    one, two = (trace(runs, f"buckets-{kind}-{run}") for run in {"dpo": ("1-2", "2-0"), "sft": ("1-0", "2-2")}[kind])
    assert [sorted(ids) for ids in one.ids] == [sorted(ids) for ids in two.ids]
    for name, weight in one.weights.items():
        torch.testing.assert_close(weight, two.weights[name], rtol=1e-3, atol=1e-4)


# ---- The loss ----


class Fixed:
    """Serves given batches and counts every pair the same: what the gate must make of them."""

    @staticmethod
    def method(batches, weighting="pair"):
        method = create_method("token_budget", weighting=weighting)
        method.mean_size = float(np.mean([len(batch) for batch in batches]))
        method.batch = lambda run, ids: [np.array(batch) for batch in batches]
        return method


def gradients_of_a_step(make_trainer, batches, method, **config):
    trainer = make_trainer(
        "dpo", gradient_accumulation_steps=len(batches), max_steps=1, max_grad_norm=0.0, optim="sgd", **config
    )
    tiny.stir(trainer)
    before = tiny.weights_of(trainer)
    if method is not None:
        trainer.add_callback(SelectionCallback(trainer, method))
    trainer.train()
    return {name: before[name] - weight for name, weight in tiny.weights_of(trainer).items()}


@pytest.mark.parametrize("lora", [False, True])
def test_every_pair_counts_the_same_whatever_its_batch(make_trainer, lora):
    rows = tiny.preferences(40).select([0, 1, 2, 3, 4, 5])
    config = {"dataset": rows, "lora": lora, "train_sampling_strategy": "random"}
    uneven, even = [[0], [1, 2, 3, 4, 5]], [[0, 1, 2], [3, 4, 5]]
    wanted = gradients_of_a_step(make_trainer, even, Fixed.method(even), **config)
    got = gradients_of_a_step(make_trainer, uneven, Fixed.method(uneven), **config)
    plain = gradients_of_a_step(make_trainer, uneven, Fixed.method(uneven, "batch"), **config)
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-7)
    largest = max(wanted, key=lambda name: wanted[name].abs().max())
    assert not torch.allclose(plain[largest], wanted[largest], rtol=0.05)


def test_the_correction_is_not_logged_as_a_weight(make_trainer):
    trainer = make_trainer("dpo", max_steps=3)
    witness = tiny.attach(trainer, "token_budget")
    trainer.train()
    assert all("weight" not in step.values for step in witness.steps)
