"""Kept results: found again where nothing they depend on has changed, by all processes or by none."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset

from dsel_trl import SelectionCallback, create_method, get_method
from dsel_trl.core.cache import cached, kept, run_fingerprint
from dsel_trl.core.costs import Costs
from dsel_trl.core.data_passes import Passes
from dsel_trl.core.helper_settings import COMPUTING, DECIDING
from tests import tiny
from tests.runs import not_here

# ---- What a key holds ----

HELPED = {
    "bees": ("dpo", {"sources": ["helper"]}),
    "rho_loss": ("dpo", {"factor": 2}),
    "s2l": ("dpo", {"checkpoints": 2, "clusters": 2}),
    "selective_dpo": ("dpo", {"evaluations": 2}),
    "jest": ("dpo", {"factor": 2, "clean_column": "one"}),
    "rho1": ("sft", {"clean_column": "one"}),
    "ifd": ("sft", {"form": "cherry", "warm_up": 1, "warm_up_clusters": 2}),
}


def helped(make_trainer, name, kind, parameters, **config):
    """Seeds and number of the helper runs that a method asks for on a trainer with `config`."""
    trainer = make_trainer(kind, **config)
    method = create_method(name, **parameters)
    callback = SelectionCallback(trainer, method)
    asked = []

    def train(train_ids, score_ids, measure, *, evaluations, seed, evaluate=None, **how):
        asked.append(seed)
        rng = np.random.default_rng(seed)
        if evaluate is not None:
            found = evaluate(callback.run.passes.forward)
            return np.stack([found] * evaluations)
        return rng.random((evaluations, len(score_ids)), dtype=np.float32)

    callback.run.train_helper = train
    method.check(callback.run)
    method.setup(callback.run)
    return asked


@pytest.mark.parametrize("name", HELPED)
def test_a_changed_argument_of_the_helper_trains_it_again(make_trainer, name):
    """One after the other into the same folder, as a user does who tries another value."""
    kind, parameters = HELPED[name]
    assert helped(make_trainer, name, kind, parameters)
    assert not helped(make_trainer, name, kind, parameters)
    changes = [
        {"weight_decay": 0.1},
        {"optim": "sgd"},
        {"gradient_accumulation_steps": 2},
        {"max_grad_norm": 0.5},
    ]
    if kind == "dpo":
        changes += [{"label_smoothing": 0.1}, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.05]}]
    for change in changes:
        assert helped(make_trainer, name, kind, parameters, **change), change
        assert not helped(make_trainer, name, kind, parameters, **change), change


@pytest.mark.parametrize("name", HELPED)
def test_the_learning_rate_of_the_run_is_that_of_a_full_helper_alone(make_trainer, name):
    """And of that only where the method has none of its own, as its authors give one for S2L."""
    kind, parameters = HELPED[name]
    has_its_own = name == "s2l"
    for lora in (True, False):
        own = parameters | {"helper_lora": lora}
        assert helped(make_trainer, name, kind, own)
        assert bool(helped(make_trainer, name, kind, own, learning_rate=1e-4)) != (lora or has_its_own)


@pytest.mark.parametrize("name", HELPED)
def test_how_it_is_computed_and_how_long_the_run_is_do_not_matter(make_trainer, name):
    kind, parameters = HELPED[name]
    assert helped(make_trainer, name, kind, parameters)
    for change in ({"num_train_epochs": 3}, {"max_steps": 2}, {"logging_steps": 7}, {"dataloader_num_workers": 1}):
        assert not helped(make_trainer, name, kind, parameters, **change), change


@pytest.mark.parametrize("name", HELPED)
def test_each_seed_of_the_run_has_helpers_of_its_own(make_trainer, name):
    kind, parameters = HELPED[name]
    seeds = [helped(make_trainer, name, kind, parameters, data_seed=seed) for seed in (1, 2, 3)]
    assert all(seeds)
    assert len({seed for found in seeds for seed in found}) == sum(len(set(found)) for found in seeds)


@pytest.mark.parametrize("name", ["bees", "rho_loss", "s2l", "selective_dpo"])
def test_a_changed_parameter_of_the_helper_trains_it_again(make_trainer, name):
    kind, parameters = HELPED[name]
    assert helped(make_trainer, name, kind, parameters)
    lora = not get_method(name).helper_lora
    for change in ({"helper_epochs": 5.0}, {"helper_lora": lora}, {"helper_learning_rate": 0.1}):
        assert helped(make_trainer, name, kind, parameters | change), change


def test_every_deciding_argument_is_in_the_key(make_trainer):
    args = SelectionCallback(make_trainer("dpo"), "uniform").run.arguments
    run = SelectionCallback(make_trainer("dpo"), "uniform").run
    values = {name: getattr(args, name) for name in (*DECIDING, *COMPUTING, "learning_rate") if hasattr(args, name)}

    def key(**changed):
        run.arguments = SimpleNamespace(**values | changed)
        return run_fingerprint(run, uses=(), helpers=[{"epochs": 1.0, "lora": False}])

    same = key()
    for name in values:
        assert (key(**{name: "changed"}) == same) == (name in COMPUTING), name


PRESCORED = {
    "perplexity": ("sft", {}, 2),
    "deita": ("sft", {"complexity_column": "difficulty", "quality_column": "weight"}, 2),
    "edge": ("sft", {"guideline": "w1 w2"}, 2),
    "ifd": ("sft", {}, 2),
    "dsir": ("sft", {"target_column": "one"}, 1),
    "zip": ("sft", {"keep": 0.2, "k1": 4, "k2": 2, "k3": 2, "workers": 1}, 1),
    "curriculum": ("sft", {"by": "rarity", "action": "curriculum"}, 1),
}


@pytest.mark.parametrize("name", PRESCORED)
def test_scores_without_a_draw_are_measured_once_for_all_seeds(make_trainer, tmp_path, name):
    """And again for another policy, where they are the policy's."""
    kind, parameters, policies = PRESCORED[name]
    for seed in (1, 2, 3):
        measured(make_trainer, name, kind, parameters, data_seed=seed)
    folder = tmp_path / "out" / "selection"
    assert len(files(folder, name)) == 1
    measured(make_trainer, name, kind, parameters, model=tiny.build_model(tmp_path / "other", seed=9))
    assert len(files(folder, name)) == policies
    measured(make_trainer, name, kind, parameters, learning_rate=1e-4, per_device_train_batch_size=4, weight_decay=0.1)
    assert len(files(folder, name)) == policies
    measured(make_trainer, name, kind, parameters, dataset=tiny.completions(40, seed=5))
    assert len(files(folder, name)) == policies + 1


def files(folder, name):
    return list(folder.glob(f"{'rarity' if name == 'curriculum' else name}-*.safetensors"))


def measured(make_trainer, name, kind, parameters, **config):
    method = create_method(name, **parameters)
    callback = SelectionCallback(make_trainer(kind, **config), method)
    method.check(callback.run)
    method.setup(callback.run)


def test_draws_follow_the_seed(make_trainer, tmp_path):
    for seed in (1, 2):
        measured(make_trainer, "semdedup", "sft", {"clusters": 3}, data_seed=seed)
    assert len(list((tmp_path / "out" / "selection").glob("semdedup-*"))) == 2
    assert len(list((tmp_path / "out" / "selection").glob("embeddings-*"))) == 1


def test_another_reference_is_another_loss(make_trainer):
    run = SelectionCallback(make_trainer("dpo"), "uniform").run
    same, policy = run_fingerprint(run, uses=("loss",)), run_fingerprint(run, uses=("policy",))
    with torch.no_grad():
        next(run.reference.parameters()).add_(0.1)
    assert run_fingerprint(run, uses=("loss",)) != same
    assert run_fingerprint(run, uses=("policy",)) == policy


def test_what_is_no_dependence_is_an_error(make_trainer):
    run = SelectionCallback(make_trainer("sft"), "uniform").run
    with pytest.raises(ValueError, match="'model' is none of"):
        cached(run, "x", [], dict, uses=("model",))


# ---- Over processes ----


class Processes:
    """Runs a function as several processes would, each with a disk of its own."""

    def __init__(self, folder, world=2):
        self.folder, self.world = folder, world
        self.barrier, self.slots = threading.Barrier(world, timeout=20), [None] * world

    def total(self, rank, values):
        self.slots[rank] = values.clone()
        self.barrier.wait()
        result = torch.stack(self.slots).sum(0).to(values.dtype)
        self.barrier.wait()
        return result

    def run(self, rank):
        passes = Passes(not_here, not_here, rank, self.world, lambda values: self.total(rank, values))
        return SimpleNamespace(shared=None, output_dir=self.folder / str(rank), passes=passes)

    def each(self, function):
        """What `function(run, rank)` gives on every process."""
        results = [None] * self.world

        def work(rank):
            try:
                results[rank] = function(self.run(rank), rank)
            except Exception as error:
                results[rank] = error

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(self.world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


ARRAYS = {
    "losses": np.float32([1.5, np.nan, -np.inf, -0.0]),
    "table": np.arange(12, dtype=np.int64).reshape(3, 4).T,
    "none": np.empty((0, 3), dtype=np.float16),
    "mask": np.array([True, False]),
}


def test_one_disk_serves_all_processes(tmp_path, monkeypatch):
    """The first one has the file; the others, which would measure for ever, get what is in it, bit for bit."""
    monkeypatch.setattr("dsel_trl.core.data_passes.PIECE", 5)
    processes, computed = Processes(tmp_path, world=3), []

    def compute(rank):
        computed.append(rank)
        processes.total(rank, torch.zeros(1))  # a pass is an exchange: no process can make it alone
        return ARRAYS

    for _ in range(2):
        found = processes.each(lambda run, rank: kept(run, "x", lambda: compute(rank)))
        for arrays in found:
            assert arrays.keys() == ARRAYS.keys()
            for name, array in ARRAYS.items():
                assert arrays[name].dtype == array.dtype
                assert arrays[name].shape == array.shape
                assert arrays[name].tobytes() == array.tobytes()
                arrays[name].sum()
    assert sorted(computed) == [0, 1, 2]
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.safetensors")] == [
        "0/selection/x.safetensors"
    ]


def test_of_runs_at_once_one_measures_and_the_others_wait(tmp_path):
    began, calls = threading.Event(), []

    def ablated(cell):
        costs = Costs()

        def compute():
            calls.append(cell)
            began.set()
            time.sleep(0.3)
            costs.add("forwards", 3, 40)
            return {"losses": np.float32([1.5, 2.5])}

        passes = Passes(not_here, not_here)
        run = SimpleNamespace(shared=tmp_path, output_dir=tmp_path / cell, passes=passes, costs=costs)
        return kept(run, "x", compute)["losses"].tolist(), dict(costs.counts)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(ablated, "a")
        assert began.wait(20)
        second = pool.submit(ablated, "b")
        assert first.result() == second.result() == ([1.5, 2.5], {"forwards": 3, "forward_tokens": 40})
    assert calls == ["a"]


def test_runs_that_do_another_thing_with_the_scores_of_an_audit_share_it(make_trainer):
    def measured(**parameters):
        method = create_method("audit", sources=["texts"], **parameters)
        callback = SelectionCallback(make_trainer("dpo"), method)
        asked = []
        size = callback.run.size
        method.measure = lambda run: asked.append(1) or {"audit": np.ones(size), "audit_agreement": np.ones(size)}
        method.setup(callback.run)
        return bool(asked)

    assert measured()
    assert not measured(action="flip", flip_above=0.9)
    assert not measured(action="keep_top", keep=0.6)
    assert measured(folds=5)


def test_a_file_that_the_first_process_does_not_see_counts_for_none(tmp_path):
    processes = Processes(tmp_path)
    stale = {"losses": np.float32([9.0])}
    other = SimpleNamespace(shared=None, output_dir=tmp_path / "1", passes=Passes(not_here, not_here))
    kept(other, "x", lambda: stale)

    def compute(rank):
        processes.total(rank, torch.zeros(1))
        return ARRAYS

    found = processes.each(lambda run, rank: kept(run, "x", lambda: compute(rank)))
    assert [arrays["losses"].tobytes() for arrays in found] == [ARRAYS["losses"].tobytes()] * 2


def test_a_broken_file_is_made_anew(tmp_path, caplog):
    (tmp_path / "0" / "selection").mkdir(parents=True)
    (tmp_path / "0" / "selection" / "x.safetensors").write_bytes(b"half a f")
    found = Processes(tmp_path).each(lambda run, rank: kept(run, "x", lambda: ARRAYS))
    assert all(arrays["mask"].tolist() == [True, False] for arrays in found)
    assert "cannot be read" in caplog.text
    again = kept(
        SimpleNamespace(shared=None, output_dir=tmp_path / "0", passes=Passes(not_here, not_here)),
        "x",
        lambda: pytest.fail("computed again"),
    )
    assert again["mask"].tolist() == [True, False]


def test_a_failure_of_the_first_process_is_one_of_all(tmp_path):
    def read():
        raise PermissionError("not yours")

    found = Processes(tmp_path).each(lambda run, rank: run.passes.everywhere(read))
    assert isinstance(found[0], PermissionError)
    assert isinstance(found[1], RuntimeError)
    assert "PermissionError: not yours" in str(found[1])


# Which process a thread stands for: the patched name below is one for all of them.
OWN = threading.local()


def rewarded(run, rank, monkeypatch, calls):
    from dsel_trl.scorers import rewards

    OWN.rank = rank

    class Counting(rewards.RewardModel):
        def __init__(self, *args):
            self.model, self.max_length, self.tokens = torch.nn.Linear(1, 1), 8, 0
            with torch.no_grad():
                self.model.weight.fill_(1.0), self.model.bias.fill_(0.0)

        def __call__(self, prompts, responses):
            calls.append((OWN.rank, len(responses)))
            return [float(len(response)) for response in responses]

    rows = {"prompt": ["a", "b", "c"], "chosen": ["x", "xx", "xxx"]}
    run.dataset, run.size, run.world = Dataset.from_dict(rows), 3, run.passes.world
    run.costs = Costs()
    run.processing_class, run.model = None, SimpleNamespace(device="cpu")
    monkeypatch.setattr(rewards, "reward_of", lambda *args: Counting())
    return rewards.dataset_rewards(run, ["chosen"], None, "model")["chosen"].tolist()


def test_rewards_of_a_model_are_shared_too(tmp_path, monkeypatch):
    calls = []
    for _ in range(2):
        found = Processes(tmp_path).each(lambda run, rank: rewarded(run, rank, monkeypatch, calls))
        assert found == [[1.0, 2.0, 3.0]] * 2
    assert sorted(calls) == [(0, 2), (1, 1)]
    assert not list(tmp_path.rglob("*.part"))
