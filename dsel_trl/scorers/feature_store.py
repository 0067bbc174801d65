"""Features of examples on disk: a file per process that numpy alone can read, and what it is of beside it in JSON."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..data.files import write_json

DTYPES = ("float16", "float32")


class FeatureStore:
    """
    One row of numbers per example, written while a pass runs; a pass that was cut off goes on where it ended.

    `<stem>-<rank>.npy` holds the rows (`np.load(..., mmap_mode="r")`), `<stem>-<rank>.json` says of what: the ids in
    the order of the rows, shape, dtype, and whatever made them (`about`: the seed of a projection, a fingerprint).
    `<stem>-<rank>.done.npy` says which rows have been written.

    Args:
        folder (`Path`):
            Where the files are.
        stem (`str`):
            What they are called.
        ids (`np.ndarray` of shape `(n,)`, int64):
            Examples of this process.
        width (`int`):
            Numbers per example.
        about (`Mapping[str, Any]`):
            JSON values that all rows hang on: files of other ones are begun anew.
        rank (`int`, *optional*, defaults to `0`):
            This process.
        dtype (`str`, *optional*, defaults to `"float16"`):
            `"float16"` or `"float32"`.

    Raises:
        `ValueError`: for another dtype, or if the disk has not the room; the message says how much is needed.

    Example:

    ```python
    >>> store = FeatureStore(folder, "less", ids, 1024, {"seed": 0})
    >>> todo = store.missing
    >>> store.write(todo[:8], features)
    >>> np.load(folder / "less-0.npy", mmap_mode="r").shape
    ```
    """

    def __init__(
        self,
        folder: Path,
        stem: str,
        ids: np.ndarray,
        width: int,
        about: Mapping[str, Any],
        rank: int = 0,
        dtype: str = "float16",
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r} is none of {list(DTYPES)}.")
        self.ids = np.asarray(ids, dtype=np.int64)
        self.path = folder / f"{stem}-{rank}.npy"
        self._done_path, self._index = folder / f"{stem}-{rank}.done.npy", folder / f"{stem}-{rank}.json"
        shape = [len(self.ids), int(width)]
        content = {"ids": self.ids.tolist(), "shape": shape, "dtype": dtype, "about": dict(about)}
        self.index: dict[str, Any] = json.loads(json.dumps(content))
        folder.mkdir(parents=True, exist_ok=True)
        if not self._continues():
            self._begin(folder, stem)
        self.rows: np.ndarray = np.load(self.path, mmap_mode="r+")
        self._done: np.ndarray = np.load(self._done_path, mmap_mode="r+")

    def _continues(self) -> bool:
        """Whether the files there are are of the same rows."""
        try:
            return (
                json.loads(self._index.read_text(encoding="utf-8")) == self.index
                and list(np.load(self.path, mmap_mode="r").shape) == self.index["shape"]
                and len(np.load(self._done_path, mmap_mode="r")) == len(self.ids)
            )
        except (OSError, ValueError):
            return False

    def _begin(self, folder: Path, stem: str) -> None:
        self._index.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)
        shape, dtype = tuple(self.index["shape"]), np.dtype(self.index["dtype"])
        needed, free = int(np.prod(shape)) * dtype.itemsize, shutil.disk_usage(folder).free
        if needed > free:
            raise ValueError(
                f"The features {stem!r} of {shape[0]} examples, {shape[1]} numbers each, need {needed / 1e9:.2f} GB, "
                f"but {str(folder)!r} has {free / 1e9:.2f} GB left: take fewer features, or another output_dir."
            )
        for path, size, kind in ((self.path, shape, dtype), (self._done_path, shape[:1], np.dtype(bool))):
            np.lib.format.open_memmap(path, mode="w+", dtype=kind, shape=size).flush()
        # The last to appear: without it the others are nobody's.
        write_json(self._index, self.index)

    @property
    def missing(self) -> np.ndarray:
        """Positions of the rows that have not been written, ascending."""
        return np.flatnonzero(~self._done)

    def write(self, positions: np.ndarray, values: np.ndarray) -> None:
        """
        Writes some rows; they count as written when they are on disk.

        Raises:
            `ValueError`: for values beyond what the dtype holds.
        """
        with np.errstate(over="ignore"):
            rows = np.asarray(values).astype(self.rows.dtype)
        if (np.isinf(rows) & np.isfinite(values)).any():
            raise ValueError(f"Features up to {np.abs(values).max():g} are beyond {self.rows.dtype}: use float32.")
        self.rows[positions] = rows
        self.rows.flush()  # type: ignore[attr-defined]
        self._done[positions] = True
        self._done.flush()  # type: ignore[attr-defined]
