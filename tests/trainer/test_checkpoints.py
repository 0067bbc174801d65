"""
A run that is killed and resumed equals one that was left alone, bit for bit.

Each run here is a process of its own (or two) that ends by a real SIGKILL, at a random step or at a place inside the
writing of a checkpoint. All runs are made at once by `tests/distributed/forked.py`; the tests look at what they left.
"""

import json
import os
import shutil
import subprocess
import sys
from itertools import chain
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from dsel_trl import SelectionCallback
from dsel_trl.trainer.checkpoints import last_complete_checkpoint
from tests import tiny
from tests.distributed.launch import launched

ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d"]
TORCHRUN += ["--rdzv_endpoint=localhost:0"]


def setting(kind, methods, world=1, workers=0, *, steps=10, save=2, size=17, **config):
    """A run of (at least) `steps` optimizer steps in two epochs; the last batch of an epoch is a short one."""
    return {
        "kind": kind,
        "methods": methods,
        "world": world,
        "steps": steps,
        "size": size,
        "config": {
            "gradient_accumulation_steps": 2,
            "num_train_epochs": 2,
            "per_device_train_batch_size": 2 // world,
            "dataloader_num_workers": workers,
            "save_strategy": "steps",
            "save_steps": save,
            "lr_scheduler_type": "linear",
            **config,
        },
    }


SETTINGS = {
    **{
        f"live-{world}p-{workers}w": setting("dpo", ["live_order"], world, workers)
        for world in (1, 2)
        for workers in (0, 2)
    },
    "live-sft-lora": setting("sft", ["live_order"], lora=True, lora_dropout=0.2),
    "live-sft-lora-2p-2w": setting("sft", ["live_order"], 2, 2, lora=True, lora_dropout=0.2),
    "two-live-sets": setting("dpo", ["live_half", "live_third"], steps=6, save=1, size=41),
    "two-live-sets-2p-2w": setting("dpo", ["live_half", "live_third"], 2, 2, steps=6, save=1, size=41),
    "random-each-epoch": setting("dpo", [["random", {"keep": 0.7, "refresh": "epoch"}]], steps=8),
    "stock-order": setting("sft", ["uniform"], lora=True, lora_dropout=0.2),
    "stock-order-2p-2w": setting("dpo", ["uniform"], 2, 2),
    "pick": setting("dpo", ["pick_longest"], steps=6, save=1),
    "pick-2p-2w": setting("dpo", ["pick_longest", "uniform"], 2, 2, steps=6, save=1),
    "margin": setting("dpo", [["margin", {"action": "sample", "keep": 0.6, "refresh": 2}]], steps=6),
    "infobatch": setting("sft", ["infobatch"], 1, 2, steps=6, save=1),
    "length_curriculum": setting("dpo", ["length_curriculum"], 2, 0, save=3),
}

EVENTS = ("on_step_begin", "on_substep_end", "on_pre_optimizer_step", "on_step_end")
PLACES = ("sidecar_tensors", "sidecar_json", "model", "optimizer", "rng", "trainer_state", "rotation")


def kills():
    """Where each run is killed: (id, setting, event, how often it is reached before, rank)."""
    rng = np.random.default_rng(20)
    cases = []
    for name, value in SETTINGS.items():
        first, last = value["config"]["save_steps"] + 1, value["steps"]
        for _ in range(2 if name.startswith("live") and "sft" not in name else 1):
            event = str(rng.choice(EVENTS))
            # Not before the first checkpoint is written. The last step of an epoch has no substep here.
            count = int(rng.integers(first, last - 1))
            rank = int(rng.integers(value["world"]))
            cases.append((f"{name}-{event}-{count}-r{rank}", name, event, count, rank))
    for place in PLACES:
        cases.append((f"saving-{place}", "live-1p-0w", place, 3, 0))
    cases += [(f"saving-2p-{place}", "live-2p-0w", place, 2, 0) for place in ("sidecar_json", "model")]
    cases.append(("saving-2p-other-rank", "live-2p-0w", "rng", 2, 1))
    return cases


KILLS = kills()


@pytest.fixture(scope="module")
def runs(model, tmp_path_factory):
    """Folder with the traces and outputs of all runs: `NAME` undisturbed, `NAME.killed` and then resumed."""
    folder = tmp_path_factory.mktemp("runs")

    def spec(name, setting, **more):
        phase = "resumed" if "resume" in more else "first"
        paths = {"model": str(model), "log": str(folder / f"{name}.{phase}.log")}
        return {**SETTINGS[setting], **paths, "output_dir": str(folder / name), **more}

    chains, names = [], []
    for name in SETTINGS:
        chains.append([spec(name, name, trace=str(folder / f"{name}.trace"))])
        names.append([(name, "alone")])
    for name, setting, event, count, rank in KILLS:
        killed = spec(name, setting, kill={"event": event, "count": count, "rank": rank})
        resumed = spec(name, setting, resume=True, trace=str(folder / f"{name}.trace"))
        if name.startswith("saving"):
            for one in (killed, resumed):
                one["config"] = {**one["config"], "save_total_limit": 1}
        chains.append([killed, resumed])
        names.append([(name, "killed"), (name, "resumed")])
    ended = launched(folder, chains)
    return folder, {
        key: (codes, spec["log"])
        for keys, chain, chain_codes in zip(names, chains, ended, strict=True)
        for key, spec, codes in zip(keys, chain, chain_codes, strict=True)
    }


def trace(folder, name) -> tiny.Trace:
    return torch.load(folder / f"{name}.trace", weights_only=False)


def assert_ended(runs, name, phase, killed_rank=None):
    codes, log = runs[1][name, phase]
    for rank, code in enumerate(codes):
        if killed_rank is None:
            assert code == 0, Path(f"{log}.{rank}").read_text()[-3000:]
        elif rank == killed_rank:
            assert code == -9, Path(f"{log}.{rank}").read_text()[-3000:]


@pytest.mark.parametrize("name", SETTINGS)
def test_left_alone(runs, name):
    assert_ended(runs, name, "alone")
    whole = trace(runs[0], name)
    assert len(whole.ids) >= 4
    assert (whole.ledger["visits"] > 0).any()


@pytest.mark.parametrize(("name", "setting", "event", "count", "rank"), KILLS, ids=[case[0] for case in KILLS])
def test_killed_and_resumed_equals_undisturbed(runs, name, setting, event, count, rank):
    assert_ended(runs, name, "killed", rank)
    assert_ended(runs, name, "resumed")
    resumed, alone = trace(runs[0], name), trace(runs[0], setting)
    assert len(resumed.ids) < len(alone.ids)
    resumed.assert_ends_as(alone)
    left = [runs[0] / run / "selection" for run in (name, setting)]
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in left]
    # A clock is all that may tell them apart.
    assert all(summary["cost"].pop("seconds") >= 0 for summary in summaries)
    assert summaries[0] == summaries[1]
    tables = [datasets.Dataset.from_parquet(str(folder / "ledger.parquet")).to_pandas() for folder in left]
    assert tables[0].equals(tables[1])


def test_live_plans_follow_the_scores(runs):
    """The runs compared above are not all in one order anyway: the live order differs from the stock one."""
    live, stock = trace(runs[0], "live-2p-0w"), trace(runs[0], "stock-order-2p-2w")
    assert live.ids != stock.ids
    assert live.ids[: len(live.ids) // 2] != live.ids[len(live.ids) // 2 :]


def test_two_processes_choose_what_one_chooses(runs):
    one, two = trace(runs[0], "live-1p-0w"), trace(runs[0], "live-2p-0w")
    # The last batch of the epoch is short: two processes fill it up, one does not.
    assert [sorted(ids) for ids in one.ids[:4]] == [sorted(ids) for ids in two.ids[:4]]


# ---- Under torchrun ----


def test_killed_and_resumed_under_torchrun(runs, model, tmp_path):
    folder, name = runs[0], "live-2p-2w"
    base = {**SETTINGS[name], "model": str(model), "output_dir": str(tmp_path / "out")}
    for phase, more in (
        ("killed", {"kill": {"event": "on_substep_end", "count": 5, "rank": 1}}),
        ("resumed", {"resume": True, "trace": str(tmp_path / "resumed.trace")}),
    ):
        path = tmp_path / f"{phase}.json"
        path.write_text(json.dumps({**base, **more}))
        done = subprocess.run(
            [*TORCHRUN, "-m", "tests.distributed.training", str(path)],
            env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=1500,
        )
        assert (done.returncode == 0) == (phase == "resumed"), done.stderr[-3000:]
    torch.load(tmp_path / "resumed.trace", weights_only=False).assert_ends_as(trace(folder, name))


# ---- What stands on disk ----


@pytest.fixture
def stopped(make_trainer):
    """Makes a trainer in one output folder; the first one has trained and left checkpoints 2 and 4."""

    def make(method="uniform", **config):
        trainer = make_trainer("dpo", **{"save_strategy": "steps", "save_steps": 2, "max_steps": 4, **config})
        trainer.add_callback(SelectionCallback(trainer, method))
        return trainer

    make().train()
    return make


def sidecar(trainer, step=4):
    return Path(trainer.args.output_dir) / f"checkpoint-{step}" / "selection"


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def count_up(path):
    values = json.loads(path.read_text())
    values["step"] += 1
    path.write_text(json.dumps(values))


def another_format(path):
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 0}))


@pytest.mark.parametrize("resume", [True, "checkpoint-4"], ids=["last", "named"])
@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("state.safetensors", Path.unlink),
        ("state.safetensors", cut),
        ("state.safetensors", flip),
        ("state.json", Path.unlink),
        ("state.json", cut),
        ("state.json", count_up),
        ("state.json", another_format),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_broken_sidecar_is_named(stopped, file, damage, resume):
    trainer = stopped(max_steps=6)
    damage(sidecar(trainer) / file)
    start = resume if resume is True else f"{trainer.args.output_dir}/{resume}"
    left = {path: path.read_bytes() for path in Path(trainer.args.output_dir).rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="checkpoint-4.*" + file):
        trainer.train(resume_from_checkpoint=start)
    assert trainer.state.global_step == 0
    assert left == {path: path.read_bytes() for path in Path(trainer.args.output_dir).rglob("*") if path.is_file()}
    trainer.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-2")
    assert trainer.state.global_step == 6


def test_a_checkpoint_without_a_sidecar_is_not_resumed(stopped):
    trainer = stopped()
    shutil.rmtree(sidecar(trainer))
    with pytest.raises(ValueError, match=r"state\.json is missing"):
        trainer.train(resume_from_checkpoint=True)


def test_an_unfinished_checkpoint_does_not_count(stopped):
    trainer = stopped()
    folder = Path(trainer.args.output_dir)
    assert last_complete_checkpoint(str(folder)).endswith("checkpoint-4")
    cut(folder / "checkpoint-4" / "trainer_state.json")
    assert last_complete_checkpoint(str(folder)).endswith("checkpoint-2")
    (folder / "checkpoint-2" / "trainer_state.json").unlink()
    (folder / "checkpoint-x").mkdir()
    with pytest.raises(ValueError, match=r"No complete checkpoint.*checkpoint-4 is incomplete"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="No complete checkpoint"):
        last_complete_checkpoint(str(folder / "elsewhere"))


@pytest.mark.parametrize(
    ("method", "config", "what"),
    [
        ("random", {}, "methods"),
        ("uniform", {"seed": 7}, "seed"),
        ("uniform", {"dataset": "shorter"}, "dataset"),
    ],
    ids=["method", "seed", "dataset"],
)
def test_another_run_is_told_what_differs(stopped, method, config, what):
    if config.get("dataset"):
        config = {"dataset": tiny.preferences(40).select(range(39))}
    trainer = stopped(method, **config)
    with pytest.raises(ValueError, match=f"does not belong to this run. Different are {what}: saved"):
        trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 0


def test_other_versions_only_on_request(stopped, monkeypatch):
    trainer = stopped(max_steps=6)
    fingerprint = trainer.selection.fingerprint
    monkeypatch.setitem(fingerprint["versions"], "torch", "1.0")
    monkeypatch.setattr(type(trainer.selection), "fingerprint", property(lambda self: fingerprint))
    with pytest.raises(ValueError, match=r"versions: saved .*now .*1\.0"):
        trainer.train(resume_from_checkpoint=True)
    trainer.selection.resume_across_versions = True
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 6


def test_a_checkpoint_at_the_end_of_an_epoch_starts_the_next_one(make_trainer):
    """Its history is finished: replaying it would serve the first epoch again."""

    def run(output_dir, resume=None, **config):
        trainer = make_trainer(
            "dpo",
            dataset=tiny.preferences(8),
            num_train_epochs=2,
            save_strategy="steps",
            save_steps=4,
            output_dir=output_dir,
            **config,
        )
        witness = tiny.attach(trainer, "random", keep=1.0)
        trainer.train(resume_from_checkpoint=resume)
        return tiny.Trace.of(trainer, witness)

    model_dir = Path(make_trainer("dpo").args.output_dir)
    whole = run(model_dir)
    assert sorted(chain(*whole.ids[4:])) == list(range(8))
    again = run(model_dir, str(model_dir / "checkpoint-4"))
    assert len(again.ids) == 4
    again.assert_ends_as(whole)


def test_skipping_no_data_plans_anew(make_trainer):
    config = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "dataset": tiny.preferences(16)}
    first = make_trainer("dpo", **config)
    tiny.attach(first, "random", keep=1.0)
    first.train()
    second = make_trainer("dpo", ignore_data_skip=True, **config)
    witness = tiny.attach(second, "random", keep=1.0)
    second.train(resume_from_checkpoint=f"{first.args.output_dir}/checkpoint-2")
    assert len(witness.ids) == 2
    assert second.selection.ledger.visits.sum() == 8


def test_training_twice_starts_over(make_trainer):
    trainer = make_trainer("dpo", max_steps=2, learning_rate=0.0)
    witness = tiny.attach(trainer, "random", keep=0.5)
    trainer.train()
    first = witness.ids
    trainer.train()
    assert trainer.selection.ledger.visits.sum() == 4
    # A method forgets what an earlier run has left.
    assert len(first) == 2
    assert witness.ids == first
