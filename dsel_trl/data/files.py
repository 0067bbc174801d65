"""Files that appear complete or not at all."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import save_file

if TYPE_CHECKING:
    pass


def write_json(path: Path, values: dict[str, Any]) -> None:
    """JSON under a temporary name, then renamed."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(values, indent=1), encoding="utf-8")
    os.replace(temporary, path)


def save_arrays(file: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes arrays as safetensors: the file appears complete or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(file.name + ".tmp")
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, temporary)
    os.replace(temporary, file)
