"""
DeepSpeed ZeRO-2 between two CPU processes equals DDP: `python -m tests.distributed.zero2`.

DeepSpeed is no dependency of the tests, so this is a script of its own. It needs (beside the project)

    pip install einops py-cpuinfo hjson msgpack ninja setuptools wheel
    DS_BUILD_OPS=0 pip install --no-build-isolation --no-deps deepspeed==0.19.8

It trains every case with and without ZeRO-2, prints how far apart the two end (the largest relative difference of a
parameter tensor, of anything in the ledger, and whether the ids are the same) and exits with 1 where they differ.
A run that is killed and resumed must end as the undisturbed one bit for bit. Weights of mean 1 over an accumulated
step (`normalize: mean1`) must be refused before the first step, for DeepSpeed steps before their mean is known.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import numpy as np
import torch
from deepspeed.comm.torch import build_shm_op

from tests import tiny
from tests.distributed import forked

ZERO2 = {
    "zero_optimization": {"stage": 2},
    "zero_allow_untested_optimizer": True,
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
}
LIMIT = 2e-5
LIVE = ["margin", {"action": "sample", "keep": 0.9, "refresh": 2}]


def setting(methods: list[Any], kind: str = "dpo", accumulation: int = 1, **config: Any) -> dict[str, Any]:
    return {
        "kind": kind,
        "methods": methods,
        "world": 2,
        "size": 21,
        "config": {
            "gradient_accumulation_steps": accumulation,
            "num_train_epochs": 2,
            "per_device_train_batch_size": 2,
            "lr_scheduler_type": "linear",
            "save_strategy": "steps",
            "save_steps": 2,
            **config,
        },
    }


PLAIN = ["weight_column", {"normalize": "none"}]
CASES = {
    "stock, accumulation 2": setting(["uniform"], accumulation=2),
    "weights as they are": setting([PLAIN]),
    "weights as they are, accumulation 2": setting([PLAIN], accumulation=2),
    "weights as they are, SFT, accumulation 2": setting([PLAIN], "sft", 2),
    "weights of mean 1": setting(["weight_column"]),
    "weights of mean 1, LoRA": setting(["weight_column"], lora=True),
    "live margins as weights": setting([["margin", {"action": "weight"}]]),
    "live margins, sampled": setting([LIVE]),
    "live margins, sampled, accumulation 2": setting([LIVE], accumulation=2),
    "a pass when training begins": setting(["scored_at_begin"], accumulation=2),
    "picked from candidates": setting(["pick_longest"], per_device_train_batch_size=1),
}
RESUMED = "live margins, sampled, accumulation 2"
KILL = {"event": "on_step_end", "count": 5, "rank": 1}
REFUSED = setting(["weight_column"], accumulation=2)


def spec(folder: Path, setting: dict[str, Any], run: str, zero2: bool = True, **more: Any) -> dict[str, Any]:
    paths = {key: str(folder / f"{run}.{key}") for key in ("output_dir", "log", "trace")}
    config = {**setting["config"], **({"deepspeed": ZERO2} if zero2 else {})}
    return {**setting, "model": str(folder / "model"), **paths, "config": config, **more}


def difference(first: tiny.Trace, second: tiny.Trace) -> tuple[float, float]:
    """Largest relative difference of a parameter tensor, and of any known value of the ledger."""
    weights = max(float((value - second.weights[name]).norm() / value.norm()) for name, value in first.weights.items())
    values = [0.0]
    for name, column in first.ledger.items():
        if name.startswith("score:"):
            both = np.isfinite(column) & np.isfinite(second.ledger[name])
            assert (np.isnan(column) == np.isnan(second.ledger[name])).all(), name
            values.append(float(np.abs(column - second.ledger[name])[both].max(initial=0.0)))
    return weights, max(values)


def main() -> int:
    # Built on the first use (a minute or two), or else by every process at once, each waiting for the others' lock.
    build_shm_op()
    folder = Path(tempfile.mkdtemp())
    tiny.build_model(folder / "model")
    chains = {}
    for number, value in enumerate(CASES.values()):
        for how in ("ddp", "zero2"):
            chains[f"{number}.{how}"] = [spec(folder, value, f"{number}.{how}", how == "zero2")]
    killed = spec(folder, CASES[RESUMED], "killed", kill=KILL)
    resumed = spec(folder, CASES[RESUMED], "resumed", output_dir=killed["output_dir"], resume=True)
    chains["killed"], chains["refused"] = [killed, resumed], [spec(folder, REFUSED, "refused")]
    ended = dict(zip(chains, forked.run(list(chains.values())), strict=True))

    def trace(run: str) -> tiny.Trace:
        assert ended.get(run, ended["killed"])[-1] == [0, 0], Path(f"{folder / run}.log.0").read_text()[-3000:]
        return torch.load(folder / f"{run}.trace", weights_only=False)

    wrong = []

    def report(case: str, right: bool, figures: str) -> None:
        print(f"{case:42} {figures:42} {'' if right else 'DIFFERS'}".rstrip())
        if not right:
            wrong.append(case)

    print(f"{'case':42} {'parameters':>10} {'ledger':>10}  ids")
    for number, case in enumerate(CASES):
        ddp, zero2 = (trace(f"{number}.{how}") for how in ("ddp", "zero2"))
        parameters, ledger = difference(ddp, zero2)
        same = ddp.ids == zero2.ids
        figures = f"{parameters:10.1e} {ledger:10.1e}  {'equal' if same else 'different'}"
        report(case, same and parameters <= LIMIT and ledger <= LIMIT, figures)
    try:
        assert ended["killed"][0][KILL["rank"]] == -9
        whole, again = trace(f"{list(CASES).index(RESUMED)}.zero2"), trace("resumed")
        assert 0 < len(again.ids) < len(whole.ids)
        again.assert_ends_as(whole)
        report("killed and resumed", True, "bit for bit as undisturbed")
    except AssertionError as error:
        report("killed and resumed", False, str(error)[:200])
    # The process that is refused first ends the other.
    logs = [Path(f"{folder / 'refused'}.log.{rank}").read_text() for rank in range(2)]
    right = any("['weight_column'] average their weights over the optimizer step" in log for log in logs)
    untouched = not list(folder.glob("refused.output_dir/checkpoint-*"))
    report("weights of mean 1, accumulation 2", right and untouched, "refused before the first step")
    print(json.dumps({"cases": len(chains), "wrong": wrong}))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
