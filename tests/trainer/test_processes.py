"""
Two processes: weights that arrive whatever way batches come to them, and runs that go on with another number of them.

All runs are made at once by `tests/distributed/forked.py`; the tests look at what they left.
"""

from itertools import chain

import pytest
import torch

from tests import tiny
from tests.distributed.launch import launched

WAYS = {
    "plain": {},
    "split": {"accelerator_config": {"split_batches": True}, "per_device_train_batch_size": 4},
    # Batches that one process makes for all must be of one width.
    "dispatched": {"accelerator_config": {"dispatch_batches": True}},
    "stream": {},
    "split-dispatched": {
        "accelerator_config": {"split_batches": True, "dispatch_batches": True},
        "per_device_train_batch_size": 4,
    },
}
ARRIVALS = [("dpo", "plain"), ("dpo", "split"), ("dpo", "dispatched"), ("dpo", "stream"), ("sft", "dispatched")]


def arrival(kind, way, swapped, method="weight_column"):
    config = {"max_steps": 3, "per_device_train_batch_size": 2, **WAYS[way]}
    even = way in ("stream", "dispatched", "split-dispatched")
    spec = {"kind": kind, "methods": [method], "world": 2, "swapped": swapped, "even": even, "config": config}
    return {**spec, "stream": way == "stream"}


def epochs(world, per_device, size=16, **more):
    """Two epochs in steps of mostly four examples, with a checkpoint after each."""
    config = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": per_device,
        "save_strategy": "steps",
        "save_steps": 1,
        "lr_scheduler_type": "linear",
    }
    return {"kind": "dpo", "methods": ["uniform"], "world": world, "size": size, "config": config, **more}


# What is continued from a checkpoint of which run, and how.
RESUMED = {
    "two-to-one": ("two", 2, epochs(1, 4)),
    "one-to-two": ("one", 2, epochs(2, 2)),
    "fewer-per-step": ("two", 2, epochs(1, 2)),
    "one-to-two-short": ("one-short", 2, epochs(2, 2, 18)),
    "fewer-per-step-leave": ("two", 2, epochs(1, 2, leave=True)),
    "one-to-two-short-leave": ("one-short", 2, epochs(2, 2, 18, leave=True)),
}
FIRST = {"two": epochs(2, 2), "one": epochs(1, 4), "one-short": epochs(1, 4, 18)}


@pytest.fixture(scope="module")
def runs(model, tmp_path_factory):
    """Folder with the traces and logs of all runs, and how the processes of each ended."""
    folder = tmp_path_factory.mktemp("processes")
    chains = {f"{kind}-{way}-{swapped}": [arrival(kind, way, swapped)] for kind, way in ARRIVALS for swapped in (0, 1)}
    chains["torn"] = [arrival("dpo", "split-dispatched", 0)]
    chains |= {f"uniform-{swapped}": [arrival("dpo", "plain", swapped, "uniform")] for swapped in (0, 1)}
    names = {name: [name] for name in chains}
    for first, spec in FIRST.items():
        names[first] = [first, *(name for name, (source, *_) in RESUMED.items() if source == first)]
        checkpoints = [str(folder / f"{first}.output_dir" / f"checkpoint-{RESUMED[n][1]}") for n in names[first][1:]]
        again = [{**RESUMED[n][2], "resume": path} for n, path in zip(names[first][1:], checkpoints, strict=True)]
        chains[first] = [spec, *again]
    for name, specs in chains.items():
        for run, spec in zip(names[name], specs, strict=True):
            spec |= {key: str(folder / f"{run}.{key}") for key in ("output_dir", "log", "trace")}
            spec["model"] = str(model)
    ended = launched(folder, list(chains.values()), timeout=900)
    return folder, dict(zip(chain(*names.values()), chain(*ended), strict=True))


def log_of(runs, name) -> str:
    return "".join(path.read_text() for path in sorted(runs[0].glob(f"{name}.log.*")))


def trace(runs, name) -> tiny.Trace:
    """What a run left, which must have ended well."""
    assert not any(runs[1][name]), log_of(runs, name)[-3000:]
    return torch.load(runs[0] / f"{name}.trace", weights_only=False)


def assert_close(mine, other, tolerance):
    assert mine.keys() == other.keys()
    for name, value in other.items():
        assert float((mine[name] - value).norm()) <= tolerance * float(value.norm()), name


@pytest.mark.parametrize(("kind", "way"), ARRIVALS)
def test_rows_of_weight_zero_do_not_matter(runs, kind, way):
    plain, swapped = (trace(runs, f"{kind}-{way}-{swapped}") for swapped in (0, 1))
    assert {len(set(step)) for step in plain.ids} == {4}
    if way != "stream":  # whose ids are the texts
        assert plain.ids == swapped.ids
        assert any(example % 2 == 0 for step in plain.ids for example in step)
    assert_close(swapped.weights, plain.weights, 1e-6)


def test_pairs_that_are_torn_apart_are_named(runs):
    """Stock takes what is left of them for pairs."""
    assert all(runs[1]["torn"])
    assert "not those of the same examples" in log_of(runs, "torn")


def test_without_weights_the_same_rows_matter(runs):
    plain, swapped = (trace(runs, f"uniform-{swapped}") for swapped in (0, 1))
    assert plain.ids == swapped.ids
    assert any((plain.weights[n] - swapped.weights[n]).norm() > 1e-3 * plain.weights[n].norm() for n in plain.weights)


@pytest.mark.parametrize(("name", "first"), [("two-to-one", "two"), ("one-to-two", "one")])
def test_as_many_examples_per_step_go_on_exactly(runs, name, first):
    again, whole = trace(runs, name), trace(runs, first)
    assert len(again.ids) == 6
    assert again.ids == whole.ids[2:]
    assert again.ledger["visits"].tolist() == whole.ledger["visits"].tolist()
    assert_close(again.weights, whole.weights, 1e-6)


@pytest.mark.parametrize(
    ("name", "reasons"),
    [
        ("fewer-per-step", ("4 examples per optimizer step", "x 2 processes", "2 examples per optimizer step")),
        ("one-to-two-short", ("the last step of an epoch has 2 examples", "x 2 processes")),
    ],
)
def test_what_cannot_be_exact_is_refused(runs, name, reasons):
    assert all(runs[1][name])
    said = log_of(runs, name)
    assert "resume_with_other_batches=True" in said
    assert all(reason in said for reason in reasons), said[-2000:]


@pytest.mark.parametrize(
    ("name", "size", "steps"), [("fewer-per-step-leave", 16, 8), ("one-to-two-short-leave", 18, 5)]
)
def test_with_leave_the_next_epoch_follows(runs, name, size, steps):
    again = trace(runs, name)
    assert "of epoch 1 are left out" in log_of(runs, name)
    assert len(again.ids) == steps
    assert set(chain(*again.ids)) == set(range(size))
