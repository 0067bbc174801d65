"""
A sharded run (FSDP2) does what one without sharding does (DDP): the same ids, scores and parameters.

Each run is two CPU processes. All of them are made at once by `tests/distributed/forked.py`; the tests look at what
they left.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests import tiny
from tests.contract import cases
from tests.distributed.launch import launched


def setting(methods, kind="dpo", *, save=0, **config):
    """Two epochs whose last steps are short, with accumulation and a learning rate that changes."""
    saving = {"save_strategy": "steps", "save_steps": save} if save else {}
    return {
        "kind": kind,
        "methods": methods,
        "world": 2,
        "size": 21,
        "config": {
            "gradient_accumulation_steps": 2,
            "num_train_epochs": 2,
            "per_device_train_batch_size": 2,
            "lr_scheduler_type": "linear",
            **saving,
            **config,
        },
    }


def vectors(size):
    """A file with a vector for each example."""
    path = Path(cases.FILES.name) / "vectors.npy"
    np.save(path, np.random.default_rng(0).normal(size=(size, 3)).astype(np.float32))
    return path


TARGET = {"target": cases.target()}
BANDIT = {"keep": 0.8, "target_refresh": 3, "calibration": 5, "clusters": 3, "draws": 2, "arms": 1, "refresh": 2}
SKILLS = {"keep": 0.6, "clusters": 3, "directions": 2, "bins": 4}
# Each is run with and without sharding; `mean1` scales the accumulated gradient.
SETTINGS = {
    "weighted": setting(["weight_column"]),
    "weighted-lora": setting(["weight_column"], lora=True),
    "live-sft": setting(["live_order"], "sft"),
    "margin": setting([["margin", {"action": "sample", "keep": 0.9, "refresh": 2}]], save=2),
    "new-reference": setting([["curry_dpo", {"stages": 2, "refresh_reference": True}]], save=2),
    "margin-weight": setting([["margin", {"action": "weight"}]]),
    "pass-in-begin": setting(["scored_at_begin"]),
    "pass-in-begin-lora": setting(["scored_at_begin"], lora=True, num_train_epochs=1),
    # What is saved in step 2 and 4 is the gradient of step 0 and 3.
    "target": setting([["inrun_shapley", {**TARGET, "target_refresh": 3, "keep": 0.8, "refresh": 2}]], save=2),
    "target-curved": setting([["inrun_shapley", {**TARGET, "taylor": 2, "action": "weight"}]], lora=True, max_steps=3),
    # Factors come from shares of the examples; the policy does not embed where it is sharded.
    "bandit": setting([["quad", {**TARGET, **BANDIT, "embedding": f"file:{vectors(21)}"}]], save=2),
    # It checks itself, against a backward pass of each example alone.
    "gradients": setting(["asks_for_all"], max_steps=2),
    "gradients-lora": setting(["asks_for_all"], "sft", lora=True, max_steps=1),
    # A second forward with gradient in each step, and a second stage from the first weights.
    "seal-sft": setting([["seal", {"target": cases.target(), "upper": 0.6, "selector_learning_rate": 5.0}]], "sft"),
    "seal-anew": setting([["seal", {"target": cases.target(), "upper": 0.6, "anew": True}]]),
    # Blocks that are moved along directions, and gradients by them, shard by shard: chosen when training begins.
    "skills": setting([["adapt_inf", SKILLS]], max_steps=2),
    "skills-gradients": setting([["adapt_inf", {**SKILLS, "features": "gradients", "directions": 4}]], max_steps=2),
    "pick": setting(["pick_longest"], per_device_train_batch_size=1, num_train_epochs=1),
}
HOWS = ("ddp", "fsdp2")
KILLED = ("margin", "new-reference", "target", "bandit")
KILL = {"event": "on_substep_end", "count": 4, "rank": 1}


@pytest.fixture(scope="module")
def runs(model, tmp_path_factory):
    """Folder with the traces and logs of all runs, `NAME.ddp` and `NAME.fsdp2`, and how each ended."""
    folder = tmp_path_factory.mktemp("fsdp2")

    def spec(name, run, fsdp2=True, **more):
        paths = {key: str(folder / f"{run}.{key}") for key in ("output_dir", "log", "trace")}
        return {**SETTINGS[name], "model": str(model), "fsdp2": fsdp2, **paths, **more}

    chains = {f"{name}.{how}": [spec(name, f"{name}.{how}", how == "fsdp2")] for name in SETTINGS for how in HOWS}
    for name in KILLED:
        killed = spec(name, f"{name}.killed", kill=KILL)
        chains[f"{name}.killed"] = [killed, {**killed, "kill": None, "resume": True}]
    chains["setup"] = [spec("weighted", "setup", methods=["scored_in_setup"])]
    ended = launched(folder, list(chains.values()), timeout=900)
    return folder, dict(zip(chains, ended, strict=True))


def trace(runs, run) -> tiny.Trace:
    """What a run left, which must have ended well."""
    folder, ended = runs
    log = "".join(Path(f"{folder / run}.log.{rank}").read_text()[-2000:] for rank in range(2))
    assert ended[run][-1] == [0, 0], log
    return torch.load(folder / f"{run}.trace", weights_only=False)


def assert_same_run(mine, other):
    """Equal ids; values and parameters equal up to the order in which gradients and their norm are summed."""
    assert mine.ids == other.ids
    for values, others in zip([*mine.values, mine.ledger], [*other.values, other.ledger], strict=True):
        assert values.keys() == others.keys()
        for name in values:
            np.testing.assert_allclose(values[name], others[name], rtol=1e-4, atol=1e-5, err_msg=name)
    assert mine.weights.keys() == other.weights.keys()
    for name, value in mine.weights.items():
        assert float((value - other.weights[name]).norm()) <= 2e-5 * float(value.norm()), name


@pytest.mark.parametrize("name", SETTINGS)
def test_sharded_equals_ddp(runs, name):
    assert_same_run(*(trace(runs, f"{name}.{how}") for how in HOWS))


def test_the_methods_acted(runs):
    """The runs compared above are not all one run."""
    weighted, margin, passed = (
        trace(runs, f"{name}.fsdp2") for name in ("weighted", "margin-weight", "pass-in-begin")
    )
    assert weighted.ids == margin.ids != passed.ids
    different = [name for name, value in weighted.weights.items() if not torch.equal(value, margin.weights[name])]
    assert different == list(weighted.weights)
    scores = passed.ledger["score:scored_at_begin"]
    assert np.ptp(scores) > 1
    assert set(passed.ids[0]) == set(np.argsort(-scores)[:8].tolist())


@pytest.mark.parametrize("name", KILLED)
def test_killed_and_resumed_equals_undisturbed(runs, name):
    folder, ended = runs
    assert ended[f"{name}.killed"][0][KILL["rank"]] == -9
    resumed, alone = trace(runs, f"{name}.killed"), trace(runs, f"{name}.fsdp2")
    assert 0 < len(resumed.ids) < len(alone.ids)
    resumed.assert_ends_as(alone)
    assert resumed.ids == trace(runs, f"{name}.ddp").ids[-len(resumed.ids) :]
    sidecars = [folder / f"{name}.{run}.output_dir" / "checkpoint-4" / "selection" for run in ("killed", "fsdp2")]
    for file in ("state.json", "state.safetensors"):
        first, second = ((sidecar / file).read_bytes() for sidecar in sidecars)
        assert first == second


def test_a_pass_before_the_model_is_in_place_is_refused(runs):
    folder, ended = runs
    assert ended["setup"] != [[0, 0]]
    logs = [Path(f"{folder}/setup.log.{rank}").read_text() for rank in range(2)]
    assert any("the model is not in place before training starts" in log for log in logs), logs
    assert not list(folder.glob("setup.output_dir/checkpoint-*"))
