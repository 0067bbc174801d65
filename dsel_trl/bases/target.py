"""What methods that follow a target share: the parameter that names it, and its rows."""

import hashlib
from collections.abc import Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset

from ..core.method import Method
from ..core.parameters import Reads, When, check_whole
from ..core.run import Run
from ..data.columns import TRUTH_PREFIX
from ..data.fingerprints import dataset_fingerprint
from ..data.rows import Rows

named = When("target given by name", ("target",), lambda method: isinstance(method.target, str | Path))


@dataclass
class Targeted(Method):
    """
    A method that follows a target: a set of examples to resemble, to help or to trust.

    It stands first among the bases of a class. `target_rows(run)` gives the examples as the trainer prepares its own;
    they are loaded and checked before the first step.
    """

    target: Any = field(
        default=None,
        metadata={
            "help": "examples to follow, in the trainer's own format: a file, a folder, a hub id or `demo`; in Python "
            "also a datasets.Dataset"
        },
    )
    target_split: str = field(default="train", metadata={"help": "split of the target"})
    target_size: int = field(default=0, metadata={"help": "examples drawn from the target; 0 takes all"})

    reads: ClassVar[Reads] = {"target_split": (named,)}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_target()
        check_whole("target_size", self.target_size, 0)
        self._target_dataset: Dataset | None = None
        self._target_rows: Rows | None = None

    def check_target(self, instead: tuple[str, ...] = ()) -> None:
        """Raises `ValueError` unless there is a target, or exactly one of the parameters that may stand `instead`."""
        names = ("target", *instead)
        found = [name for name in names if getattr(self, name) is not None]
        if len(found) != 1 and instead:
            values = " and ".join(f"{name}={getattr(self, name)!r}" for name in names)
            raise ValueError(f"{values}: give exactly one of them.")
        if not found:
            raise ValueError(
                f"target=None: {self.name!r} follows a target. Give a file, a folder or the name of a dataset in the "
                "format of the training set (in Python also a datasets.Dataset)."
            )
        if self.target is not None:
            check_set("target", self.target)

    def load_target(self, run: Run) -> Dataset:
        """All of the target as the user has it; `ValueError` or `FileNotFoundError` where there is none."""
        return load_set(run, self.target, self.target_split)

    def target_dataset(self, run: Run) -> Dataset:
        """The target as the user has it: all of it, or the `target_size` examples drawn."""
        if self._target_dataset is None:
            self._target_dataset = drawn(run, "target", self.target, self.load_target(run), self.target_size)
        return self._target_dataset

    def target_rows(self, run: Run) -> Rows:
        """The target as the trainer prepares its own rows."""
        if self._target_rows is None:
            self._target_rows = prepared(run, "target", self.target, self.target_dataset(run))
        return self._target_rows

    def read_target(self, run: Run) -> Sized:
        """What the method takes of the target; all that is wrong with the target shows here."""
        return self.target_rows(run)

    def check(self, run: Run) -> None:
        super().check(run)
        if self.target is not None:
            self.read_target(run)

    def units(self, run: Run) -> dict[str, float]:
        return {**super().units(run), "target example": 0 if self.target is None else len(self.read_target(run))}

    def describe(self) -> dict[str, Any]:
        described = super().describe()
        return described if self.target is None else {**described, "target_content": content_of(self.target)}


def check_set(name: str, value: Any) -> None:
    """Raises `ValueError` unless the parameter `name` names a set of examples or is one."""
    if not isinstance(value, str | Path | Dataset) or value == "":
        hint = " Take one of its splits." if isinstance(value, dict) else ""
        raise ValueError(
            f"{name}={type(value).__name__} {str(value)[:60]!r} is neither a name nor a datasets.Dataset.{hint}"
        )
    if isinstance(value, Dataset) and not len(value):
        raise ValueError(f"{name}: the dataset is empty.")


def load_set(run: Run, value: str | Path | Dataset, split: str) -> Dataset:
    """A set of examples as the user has it, by name or as it is."""
    return value if isinstance(value, Dataset) else run.load(str(value), split, "target_split")


def drawn(run: Run, name: str, value: Any, dataset: Dataset, size: int) -> Dataset:
    """
    `size` examples of a set that a parameter has named, all of them for 0: the same ones for every method of a run.

    Raises:
        `ValueError`: if it has none, or fewer.
    """
    if not len(dataset):
        raise ValueError(f"{name}={_shown(value)} holds no examples.")
    if size > len(dataset):
        raise ValueError(
            f"target_size={size} is more than the {len(dataset)} examples of {name}={_shown(value)}: give at most so "
            "many, or 0 for all."
        )
    if not 0 < size < len(dataset):
        return dataset
    return dataset.select(np.sort(run.rng(f"{name}/rows").choice(len(dataset), size=size, replace=False)))


def prepared(run: Run, name: str, value: Any, dataset: Dataset) -> Rows:
    """A set of examples as the trainer prepares its own rows; `ValueError` if it leaves none of them."""
    rows = run.prepare(dataset, name)
    if not len(rows):
        raise ValueError(
            f"{name}={_shown(value)}: none of its examples is left when the trainer prepares them; their prompts are "
            f"longer than max_length={rows.max_length}, or nothing in them is trained."
        )
    return rows


def _shown(value: Any) -> str:
    return "the given dataset" if isinstance(value, Dataset) else repr(str(value))


def content_of(target: str | Path | Dataset) -> str:
    """
    Hash of what a target holds: of a dataset's values or of the files of a path; empty for a name.

    Two targets of one name must not pass for each other, in a checkpoint or on disk.
    """
    if isinstance(target, Dataset):
        return dataset_fingerprint(target, [name for name in target.column_names if not name.startswith(TRUTH_PREFIX)])
    path = Path(target).expanduser()
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    if not path.exists():
        return ""
    digest = hashlib.sha256()
    for file in files:
        digest.update(str(file.relative_to(path)).encode())
        with open(file, "rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
