"""Files that appear complete or not at all."""

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

try:
    import fcntl
except ImportError:
    # Where files cannot be held, two processes may do the same work, to the same end.
    fcntl = None  # type: ignore[assignment]


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """
    A path to write a file (or to make a folder) at, which takes the place of `path` when the block ends.

    It is one of its own for each writer, in the folder of `path`, which is made where it is missing. If the block
    fails, what was written is removed and `path` is what it was.

    Example:

    ```python
    >>> with replacing(path) as temporary:
    ...     temporary.write_text("all of it")
    ```
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Processes of two machines may share a folder and have the same number.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
        raise


@contextmanager
def trying(path: str | os.PathLike) -> Iterator[bool]:
    """
    Whether this process is, until the block ends, the only one that works on what a file beside `path` stands for.

    Another process that holds it may be asked for again; one that was killed holds nothing.
    """
    if fcntl is None:
        yield True
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Writes JSON values: the file appears complete or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def save_arrays(file: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes arrays as safetensors: the file appears complete or not at all."""
    with replacing(file) as temporary:
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, temporary)
