"""The selection's part of a checkpoint: whole or not there, and never another run's."""

import hashlib
import json
import logging
import os
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from ..data.files import save_arrays, write_json

logger = logging.getLogger(__name__)

FORMAT = 1
CHECKSUM = "sha256"
VERSIONED = ("dsel-trl", "trl", "transformers", "torch")


def write_sidecar(folder: str | os.PathLike, arrays: dict[str, np.ndarray], values: dict[str, Any]) -> None:
    """
    Saves arrays (safetensors) and JSON values so that a reader finds either all of it or nothing.

    The JSON, which carries the checksum of the tensors and its own, is the last to appear.
    """
    folder = Path(folder)
    tensors, state = folder / "state.safetensors", folder / "state.json"
    state.unlink(missing_ok=True)
    save_arrays(tensors, arrays)
    values = {"format": FORMAT, "tensors": _sha256(tensors), **values}
    write_json(state, {**values, CHECKSUM: _json_sha256(values)})


def read_sidecar(folder: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """
    Reads what `write_sidecar` wrote.

    Raises:
        `ValueError`: if a file is missing, cut short or changed; the message names the file.
    """
    folder = Path(folder)
    tensors, state = folder / "state.safetensors", folder / "state.json"
    for path in (state, tensors):
        if not path.is_file():
            raise ValueError(
                f"{folder.parent} has no complete selection state: {path.name} is missing in {folder}. Resume from an "
                "earlier checkpoint."
            )
    try:
        values = json.loads(state.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{state} is not readable JSON ({error}). Resume from an earlier checkpoint.") from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise ValueError(f"{state} is not a selection state of format {FORMAT}. Resume from an earlier checkpoint.")
    if values.pop(CHECKSUM, None) != _json_sha256(values):
        raise ValueError(f"{state} was changed since it was saved. Resume from an earlier checkpoint.")
    if values.get("tensors") != _sha256(tensors):
        raise ValueError(f"{tensors} was cut short or changed since it was saved. Resume from an earlier checkpoint.")
    return load_file(tensors), values


def _json_sha256(values: dict[str, Any]) -> str:
    # By way of JSON, so that what is read back (keys as text, tuples as lists) counts as the same.
    plain = json.loads(json.dumps(values))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def part(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The arrays under `prefix/`, by their names without it."""
    return {name.removeprefix(f"{prefix}/"): a for name, a in arrays.items() if name.startswith(f"{prefix}/")}


def versions() -> dict[str, str]:
    """Versions of the libraries that decide whether a resumed run is bit-identical."""
    return {name: _version(name) for name in VERSIONED}


@cache
def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "source"


def check_fingerprint(
    saved: dict[str, Any], ours: dict[str, Any], checkpoint: str, *, across_versions: bool = False
) -> None:
    """Raises `ValueError`, naming what differs, if a checkpoint's fingerprint is not that of this run."""
    different = [key for key in ours if saved.get(key) != ours[key]]
    if across_versions and "versions" in different:
        different.remove("versions")
        logger.warning("Resuming %s across versions: %s -> %s", checkpoint, saved["versions"], ours["versions"])
    if different:
        detail = "; ".join(f"{key}: saved {saved.get(key)!r}, now {ours[key]!r}" for key in different)
        raise ValueError(f"{checkpoint} does not belong to this run. Different are {detail}.")
