"""Tables of values: what each row of a dataset was found to be worth, as parquet."""

from pathlib import Path

import numpy as np
from datasets import Dataset
from datasets.exceptions import DatasetGenerationError

from .columns import numeric_column
from .files import replacing

ROW, VALUE, GROUP = "id", "value", "group"


def write_values(path: Path, values: np.ndarray, groups: list[str] | None = None) -> None:
    """
    Writes the value of every row of a dataset, `(N,)`, beside its number and, where there are any, its group.

    The file appears complete or not at all.
    """
    table = {ROW: np.arange(len(values)), VALUE: values} | ({} if groups is None else {GROUP: groups})
    with replacing(path) as temporary:
        Dataset.from_dict(table).to_parquet(str(temporary))


def read_values(path: str | Path, positions: np.ndarray) -> np.ndarray:
    """
    The values of the rows at `positions` `(n,)` of the dataset that was valued, float64 of shape `(n,)`.

    Raises:
        `FileNotFoundError`: if there is no such file.
        `ValueError`: if it is no such table, or knows no such row.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"There is no table of values {str(path)!r}: `dsel value` writes one.")
    try:
        table = Dataset.from_parquet(str(file), keep_in_memory=True)
        rows, values = (numeric_column(table, name) for name in (ROW, VALUE))
    except (ValueError, OSError, DatasetGenerationError) as error:
        raise ValueError(
            f"{str(path)!r} is no parquet table of numbers {ROW!r} and {VALUE!r}, as `dsel value` writes it: {error}"
        ) from error
    if not np.array_equal(rows, np.arange(len(rows))):
        raise ValueError(f"{str(path)!r}: column {ROW!r} does not number the rows from 0 on.")
    if len(positions) and positions.max() >= len(values):
        raise ValueError(
            f"{str(path)!r} holds {len(values)} values, but the dataset has a row {int(positions.max())}: it was made "
            "of another dataset, or of another split."
        )
    return values[positions]
