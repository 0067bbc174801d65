"""Reading training data: files, folders, hub datasets and the demo corpus, with errors that say what is wrong."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pyarrow as pa
from datasets import (
    Dataset,
    DatasetDict,
    IterableDataset,
    IterableDatasetDict,
    load_dataset,
    load_from_disk,
)
from datasets.exceptions import DatasetNotFoundError, DatasetsError

from .columns import ROW_NUMBER, column_names
from .demo.corpus import demo_preferences

Splits: TypeAlias = DatasetDict | IterableDatasetDict
AnyDataset: TypeAlias = Dataset | IterableDataset

DEMO = "demo"
READERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}


def _reader(path: Path) -> str | None:
    """The `datasets` reader of a data file, by its ending (also compressed); `None` for anything else."""
    suffixes = [suffix for suffix in path.suffixes if suffix not in (".gz", ".zst", ".bz2", ".xz")]
    return READERS.get(suffixes[-1].lower()) if suffixes else None


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1 or _reader(Path(name)) is not None


def _load_saved(path: Path, streaming: bool) -> Splits:
    saved = load_from_disk(str(path))
    splits = saved if isinstance(saved, DatasetDict) else DatasetDict(train=saved)
    if streaming:
        return IterableDatasetDict({name: split.to_iterable_dataset() for name, split in splits.items()})
    return splits


def _load_local(path: Path, config: str | None, streaming: bool) -> Splits:
    if path.is_dir():
        if (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file():
            return _load_saved(path, streaming)
        if not any(_reader(file) for file in path.rglob("*") if file.is_file()):
            raise ValueError(f"The folder {str(path)!r} holds no {', '.join(READERS)} file and no saved dataset.")
        return load_dataset(str(path), name=config, streaming=streaming)
    reader = _reader(path)
    if reader is None:
        raise ValueError(f"{str(path)!r} is none of {', '.join(READERS)}: convert it, or give a folder or a hub id.")
    return load_dataset(reader, data_files={"train": str(path)}, streaming=streaming)


def load_splits(
    name: str,
    *,
    demo: Callable[[], DatasetDict] = demo_preferences,
    config: str | None = None,
    streaming: bool = False,
) -> Splits:
    """
    Loads all splits of a dataset. Code that comes with a dataset is never run.

    Args:
        name (`str`):
            A parquet, jsonl, json or csv file (one split, `train`); a folder of such files, named after their splits;
            a folder made by `save_to_disk`; a hub id; or `demo`, the built-in corpus. A folder or file goes before a
            hub id of the same name, and `demo` goes before both.
        demo (`Callable`, *optional*, defaults to [`~dsel_trl.data.demo.corpus.demo_preferences`]):
            Makes the built-in corpus in the form that is wanted.
        config (`str`, *optional*):
            Configuration of a hub dataset.
        streaming (`bool`, *optional*, defaults to `False`):
            Whether to read the rows while training.

    Returns:
        [`~datasets.DatasetDict`] or [`~datasets.IterableDatasetDict`]

    Raises:
        `FileNotFoundError`: if there is no such file, folder or hub dataset.
        `ValueError`: if what is there cannot be read.
    """
    if name == DEMO:
        corpus = demo()
        if not streaming:
            return corpus
        return IterableDatasetDict({split: rows.to_iterable_dataset() for split, rows in corpus.items()})
    path = Path(name).expanduser()
    if not path.exists() and _looks_like_path(name):
        where = path.parent if path.parent.is_dir() else Path.cwd()
        raise FileNotFoundError(f"There is no file or folder {name!r} (looked in {str(where.resolve())!r}).")
    try:
        return (
            _load_local(path, config, streaming)
            if path.exists()
            else load_dataset(name, name=config, streaming=streaming)
        )
    except (DatasetNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"{name!r} is no file or folder here, and the hub gave no dataset of that name ({error})."
        ) from error
    except (DatasetsError, pa.ArrowException) as error:
        # `datasets` says what went wrong in the cause, and that something did in the error itself.
        raise ValueError(f"{name!r} cannot be read: {error.__cause__ or error}") from error
    except ValueError as error:
        if "corresponds to no data" not in str(error):
            raise
        raise ValueError(f"The dataset {name!r} has no rows.") from error


def take_split(splits: Splits, split: str, name: str, key: str) -> AnyDataset:
    """
    One split of a loaded dataset.

    Args:
        splits ([`~datasets.DatasetDict`] or [`~datasets.IterableDatasetDict`]):
            What was loaded.
        split (`str`):
            The split wanted.
        name (`str`):
            Name of the dataset, for the error.
        key (`str`):
            The argument that names the split, for the error.

    Raises:
        `ValueError`: if there is no such split; the message lists those there are.
    """
    if split not in splits:
        raise ValueError(f"The dataset {name!r} has no split {split!r}, it has {sorted(splits)}: set --{key}.")
    return splits[split]


def check_rows(dataset: AnyDataset, name: str, choices: Sequence[tuple[str, ...]], command: str) -> None:
    """
    Checks that a dataset holds what the trainer needs.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            The rows.
        name (`str`):
            Name of the dataset, for the error.
        choices (`Sequence[tuple[str, ...]]`):
            Sets of columns, one of which must be there.
        command (`str`):
            What needs them, for the error.

    Raises:
        `ValueError`: if there are no rows, no suitable columns, or rows without a value in them.
    """
    if isinstance(dataset, Dataset) and not len(dataset):
        raise ValueError(f"The dataset {name!r} has no rows.")
    try:
        columns = column_names(dataset)
    except StopIteration:
        raise ValueError(f"The dataset {name!r} has no rows.") from None
    fitting = next((choice for choice in choices if set(choice) <= set(columns)), None)
    if fitting is None:
        wanted = ", or ".join(" and ".join(repr(column) for column in choice) for choice in choices)
        raise ValueError(f"`{command}` needs the columns {wanted}, but the columns of {name!r} are {columns}.")
    if not isinstance(dataset, Dataset):
        return
    for column in (*fitting, "prompt"):
        if column not in columns:
            continue
        missing = dataset.select_columns([column]).with_format("arrow")[:].column(column)
        if missing.null_count:
            row = int(np.flatnonzero(missing.is_null().to_numpy())[0])
            raise ValueError(
                f"Column {column!r} of {name!r} is empty in {missing.null_count} rows, first in row {row}."
            )


def number_rows(dataset: AnyDataset) -> AnyDataset:
    """
    Adds a column with a row's position in this dataset, which survives TRL's dropping of over-long rows.

    A stream has no positions and is left as it is.
    """
    if not isinstance(dataset, Dataset):
        return dataset
    return dataset.add_column(ROW_NUMBER, np.arange(len(dataset)))
