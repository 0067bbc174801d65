"""Results of expensive passes, kept under `output_dir/selection` by a fingerprint of all they depend on."""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file

from .helper_settings import COMPUTING, LORA, LOSS, PRECISION, ROWS, helper_arguments

if TYPE_CHECKING:
    from .run import Run
from ..data.files import save_arrays, trying

logger = logging.getLogger(__name__)

# Numbers looked at per parameter: enough to tell two checkpoints of a run apart.
SAMPLED = 256
# What a result can depend on beside the rows: the policy's forwards, the run's loss and reference, the run's seed.
USES = ("policy", "loss", "seed")
# Name among shared arrays of what they have cost.
COST = "cost of measuring"
# Seconds after which it is asked again whether another run has measured what this one waits for.
PAUSE = 0.2
REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps", "ref_logps")


def model_fingerprint(model: Any) -> str:
    """Hash of a model's architecture and of the first numbers of each of its parameters."""
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, parameter in model.named_parameters():
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        sample = parameter.detach().flatten()[:SAMPLED]
        digest.update(sample.to(torch.float32 if sample.is_floating_point() else sample.dtype).cpu().numpy().tobytes())
    return digest.hexdigest()


def run_fingerprint(
    run: "Run",
    *parts: Any,
    uses: Collection[str] = USES,
    helpers: Sequence[Mapping[str, Any]] = (),
    columns: Sequence[str] = (),
) -> str:
    """
    Hash of the run's rows, of `parts` (JSON values), and of what else a result depends on.

    Args:
        run ([`Run`]):
            The run.
        *parts:
            JSON values.
        uses (`Collection[str]`, *optional*):
            Any of `"policy"` (forwards of the policy), `"loss"` (what decides the run's loss, its reference included)
            and `"seed"` (draws of the run). All of them by default.
        helpers (`Sequence[Mapping]`, *optional*):
            Helper runs it comes from: of each the arguments `epochs`, `learning_rate`, `lora`, `model` and `seed`, as
            it is started with them. What the run shares with a helper counts by itself.
        columns (`Sequence[str]`, *optional*):
            Numeric dataset columns beside the tokens.
    """
    unknown = sorted(set(uses) - set(USES))
    if unknown:
        raise ValueError(f"uses={list(uses)}: {unknown[0]!r} is none of {list(USES)}.")
    arguments = run.arguments
    content: dict[str, Any] = {
        "parts": parts,
        "rows": [run.rows.fingerprint(columns), _taken(arguments, ROWS)],
        "helpers": [_helper(run, helper) for helper in helpers],
    }
    if "policy" in uses:
        content["policy"] = [model_fingerprint(run.model), _taken(arguments, PRECISION)]
    if "loss" in uses:
        precomputed = [name for name in REFERENCE_COLUMNS if name in run.dataset.column_names]
        reference = None if run.reference is None else model_fingerprint(run.reference)
        content["loss"] = [_taken(arguments, LOSS), reference, run.rows.fingerprint(precomputed)]
    if "seed" in uses:
        content["seed"] = run.seed
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _taken(arguments: Any, names: Sequence[str]) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}


def _helper(run: "Run", helper: Mapping[str, Any]) -> dict[str, Any]:
    """All that decides what a helper run gives, but the examples it trains on."""
    own = {name: helper[name] for name in ("learning_rate", "epochs", "lora", "seed") if name in helper}
    made = helper_arguments(run.arguments, **own)
    model = helper.get("model")
    return {
        "arguments": {name: value for name, value in made.items() if name not in COMPUTING},
        "adapter": LORA if helper.get("lora", True) else None,
        "model": model_fingerprint(run.model) if model is None else model,
        "processes": run.world,
    }


def cached(
    run: "Run",
    name: str,
    parts: Any,
    compute: Callable[[], dict[str, np.ndarray]],
    *,
    uses: Collection[str] = USES,
    helpers: Sequence[Mapping[str, Any]] = (),
    columns: Sequence[str] = (),
) -> dict[str, np.ndarray]:
    """
    What `compute` gives, from disk if an earlier run has computed it from the same. All processes must call it.

    Args:
        run ([`Run`]):
            The run.
        name (`str`):
            Beginning of the file's name.
        parts:
            What the result depends on beside the run: JSON values.
        compute (`Callable`):
            Gives arrays by name, the same on every process.
        uses, helpers, columns:
            What of the run it depends on: see [`run_fingerprint`].
    """
    key = run_fingerprint(run, name, parts, uses=uses, helpers=helpers, columns=columns)
    return kept(run, f"{name}-{key}", compute)


def kept(run: "Run", stem: str, compute: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """
    The arrays of `output_dir/selection/<stem>.safetensors`, which are computed where there is no such file.

    Runs that share a folder (`run.shared`) find each other's, and each of them is charged for what it has cost; of
    those that run at once, one computes and the others wait for it.

    The first process decides and reads for all: the others may be on machines that do not see its disk. So all
    processes must call it, and `compute` must give the same to each of them.
    """
    if run.shared is None:
        return _kept(run, Path(run.output_dir) / "selection" / f"{stem}.safetensors", compute)
    file = run.shared / f"{stem}.safetensors"
    while True:
        with ExitStack() as holding:
            # All processes of a run ask together, and again: waiting inside of a collective would end it in time.
            held = run.passes.everywhere(lambda: {"held": np.array([holding.enter_context(trying(file))])})
            assert held is not None
            if held["held"][0]:
                return _kept(run, file, compute)
        time.sleep(PAUSE)


def _kept(run: "Run", file: Path, compute: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    found = run.passes.everywhere(lambda: _read(file))
    if found is not None:
        cost = found.pop(COST, None)
        if cost is not None:
            run.costs.counts.update(json.loads(cost.tobytes()))
        return found
    before = None if run.shared is None else run.costs.counts.copy()
    arrays = compute()
    if run.passes.rank == 0:
        added = {} if before is None else {COST: _as_bytes(run.costs.counts - before)}
        save_arrays(file, {**arrays, **added})
    return arrays


def _as_bytes(counts: Mapping[str, int]) -> np.ndarray:
    return np.frombuffer(json.dumps(dict(sorted(counts.items()))).encode(), dtype=np.uint8)


def _read(file: Path) -> dict[str, np.ndarray] | None:
    if not file.is_file():
        return None
    try:
        return load_file(file)
    except SafetensorError as error:
        logger.warning("%s cannot be read (%s): what it held is computed again.", file, error)
        return None
