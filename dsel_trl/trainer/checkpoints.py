"""Checkpoints: which are complete, and the selection's part of them."""

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.sidecar import read_sidecar

if TYPE_CHECKING:
    _Trainer = Any
else:
    _Trainer = object


CHECKPOINT = re.compile(r"^checkpoint-(\d+)$")


def last_complete_checkpoint(output_dir: str) -> str:
    """
    The newest checkpoint that was written to its end: one in the making when its run was killed does not count.

    Raises:
        `ValueError`: if there is none.
    """
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if CHECKPOINT.match(path.name)]
    problems = []
    for folder in sorted(folders, key=lambda path: int(path.name.split("-")[1]), reverse=True):
        try:
            check_finished(folder)
        except ValueError as error:
            problems.append(str(error))
            continue
        return str(folder)
    raise ValueError(f"No complete checkpoint found in output directory ({output_dir}). {' '.join(problems)}".strip())


def check_finished(folder: str | os.PathLike) -> None:
    """Raises `ValueError` if the last file of a checkpoint, by which it is complete, is missing or cut short."""
    state = Path(folder) / "trainer_state.json"
    try:
        json.loads(state.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is incomplete: {state.name} cannot be read ({error}).") from error


def check_checkpoint(folder: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The selection state of a complete checkpoint; `ValueError` says what is missing or broken."""
    check_finished(folder)
    return read_sidecar(Path(folder) / "selection")
