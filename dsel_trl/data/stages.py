"""A stream of datasets that are trained one after the other, and what of the earlier ones comes again."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from datasets import Dataset, concatenate_datasets

from .columns import plain_column

logger = logging.getLogger(__name__)

STAGE = "stage"
ALL = "all"


def read_replay(value: str | float) -> str | float:
    """
    What of the earlier stages comes again: a share of the new rows, at least 0, or `"all"`.

    Raises:
        `ValueError`: for anything else.
    """
    if value == ALL:
        return ALL
    try:
        share = float(value)
    except (TypeError, ValueError):
        share = -1.0
    if not 0 <= share < float("inf"):
        raise ValueError(
            f"replay={value!r} is neither a number of at least 0 (earlier rows per new row, drawn at random) nor "
            f"{ALL!r} (all earlier rows that are left)."
        )
    return share


def split_by(dataset: Dataset, column: str) -> dict[str, Dataset]:
    """The rows of a dataset by the value of a column: numbers in their order, texts in that of their first row."""
    if column not in dataset.column_names:
        raise ValueError(f"stages: there is no column {column!r}, only {sorted(dataset.column_names)}.")
    values = list(plain_column(dataset, column))
    if any(value is None for value in values):
        raise ValueError(f"stages: column {column!r} is empty in row {values.index(None)}.")
    names = dict.fromkeys(values)
    if not all(isinstance(name, str) for name in names):
        names = dict.fromkeys(sorted(names))
    return {str(name): dataset.select([row for row, value in enumerate(values) if value == name]) for name in names}


@dataclass
class Stream:
    """
    The training rows of all stages as one dataset, and which of them are left.

    Args:
        rows ([`~datasets.Dataset`]):
            All rows in the order of the stages, with the columns that all of them have and `stage`, its name.
        starts (`np.ndarray` of shape `(K + 1,)`, int64):
            Where each stage begins; the last is the number of rows.
        left (`np.ndarray` of shape `(N,)`, bool):
            Which rows have not been dropped for good.
    """

    rows: Dataset
    starts: np.ndarray
    left: np.ndarray

    @classmethod
    def of(cls, names: Sequence[str], datasets: Sequence[Dataset]) -> "Stream":
        """
        Joins the datasets of the stages.

        Raises:
            `ValueError`: if one has a column `stage` of its own, or columns of one name hold different things.
        """
        common = [name for name in datasets[0].column_names if all(name in d.column_names for d in datasets)]
        apart = sorted({name for dataset in datasets for name in dataset.column_names} - set(common))
        if apart:
            logger.info("The stages have not all the columns %s: they are left out.", apart)
        if STAGE in common:
            # What is in it decides the stages already, or is none of their names.
            common.remove(STAGE)
        parts = []
        for name, dataset in zip(names, datasets, strict=True):
            parts.append(dataset.select_columns(common).add_column(STAGE, [name] * len(dataset)))
        for name, part in zip(names[1:], parts[1:], strict=True):
            for column in common:
                if part.features[column] != parts[0].features[column]:
                    raise ValueError(
                        f"stages: column {column!r} holds {part.features[column]} in {name!r}, but "
                        f"{parts[0].features[column]} in {names[0]!r}. Make them alike."
                    )
        starts = np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int64)
        return cls(concatenate_datasets(parts), starts, np.ones(int(starts[-1]), dtype=bool))

    def pool(self, stage: int, replay: str | float, rng: np.random.Generator) -> np.ndarray:
        """
        Rows that a stage may be trained on, ascending: its own, and of the earlier ones that are left what `replay`
        says (a number: so many drawn at random per row of its own).
        """
        own = np.arange(self.starts[stage], self.starts[stage + 1])
        earlier = np.flatnonzero(self.left[: self.starts[stage]])
        if not isinstance(replay, str):
            wanted = min(len(earlier), round(replay * len(own)))
            earlier = np.sort(rng.choice(earlier, wanted, replace=False))
        return np.concatenate([earlier, own])

    def drop(self, ids: np.ndarray) -> None:
        """Leaves rows out of all later stages."""
        self.left[ids] = False
