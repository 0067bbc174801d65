"""Results of expensive passes, kept under `output_dir/selection` by a fingerprint of all they depend on."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.numpy import load_file

if TYPE_CHECKING:
    from .run import Run
from ..data.files import save_arrays

# Numbers looked at per parameter: enough to tell two checkpoints of a run apart.
SAMPLED = 256
# What of the training arguments decides what a helper model learns.
TRAINING = ("beta", "learning_rate", "max_length", "loss_type", "per_device_train_batch_size", "bf16", "fp16")


def model_fingerprint(model: Any) -> str:
    """Hash of a model's architecture and of the first numbers of each of its parameters."""
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, parameter in model.named_parameters():
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        sample = parameter.detach().flatten()[:SAMPLED]
        digest.update(sample.to(torch.float32 if sample.is_floating_point() else sample.dtype).cpu().numpy().tobytes())
    return digest.hexdigest()


def run_fingerprint(run: "Run", *parts: Any) -> str:
    """Hash of the run's dataset, model and training arguments, and of `parts` (JSON values)."""
    arguments = {name: getattr(run.arguments, name, None) for name in TRAINING}
    content = [run.rows.fingerprint(), model_fingerprint(run.model), run.seed, arguments, parts]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def cached(run: "Run", name: str, parts: Any, compute: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """
    What `compute` gives, from disk if an earlier run of the same data, model, arguments and `parts` has computed it.

    Args:
        run ([`Run`]):
            The run.
        name (`str`):
            Beginning of the file's name.
        parts:
            What the result depends on beside the run: JSON values.
        compute (`Callable`):
            Gives arrays by name, the same on every process.
    """
    file = Path(run.output_dir) / "selection" / f"{name}-{run_fingerprint(run, name, parts)}.safetensors"
    if file.is_file():
        return load_file(file)
    arrays = compute()
    if run.passes.rank == 0:
        save_arrays(file, arrays)
    return arrays
