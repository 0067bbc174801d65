"""`dsel export`: what a run kept, with weights and reasons, as a dataset that any trainer reads."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..core.registry import create_method
from ..data.files import replacing
from ..report.record import RunRecord
from . import COMMANDS
from .run_data import rows_of

# Columns of the ledger's table that go along, and what they are called among the user's own.
ALONG = ("weight", "visits", "dropped_by", "decided_by", "decision_score", "reason")
PREFIX = "dsel_"


def export_run(words: Sequence[str]) -> str:
    """
    Runs `dsel export RUN_DIR --output_file FILE`.

    Args:
        words (`Sequence[str]`):
            The words after `dsel export`.

    Returns:
        `str`: what was written where.

    Raises:
        `FileNotFoundError`: if the folder holds no finished run, or there is no such dataset.
        `ValueError`: for an unknown word, an existing file, or a run that has trained on rows of its own making.
    """
    asked, unknown = _parser().parse_known_args(list(words))
    if unknown:
        raise ValueError(f"Unexpected word {unknown[0]!r}. See `dsel export --help`.")
    folder, output = Path(asked.run_dir), Path(asked.output_file or Path(asked.run_dir) / "kept.parquet")
    if output.suffix != ".parquet":
        raise ValueError(f"output_file: {str(output)!r} must end in .parquet.")
    if output.exists():
        raise ValueError(f"output_file: {str(output)!r} exists; nothing was overwritten.")
    record = RunRecord.read(folder)
    _refuse_rebuilt(record)
    rows = rows_of(record, asked.dataset_name, asked.dataset_train_split)
    chosen = np.arange(len(record.visits)) if asked.all else np.flatnonzero(_kept(record))
    if taken := [name for name in ALONG if PREFIX + name in rows.column_names]:
        raise ValueError(f"The dataset has a column {PREFIX + taken[0]!r}, as an export has: rename that column.")
    found = rows.select(record.table["id"][chosen])
    for name in ALONG:
        if name in record.table:
            values = record.table[name][chosen]
            found = found.add_column(PREFIX + name, values.tolist() if values.dtype == object else values)
    with replacing(output) as temporary:
        found.to_parquet(str(temporary))
    return f"{len(found)} rows of {len(rows)}: {output}"


def _kept(record: RunRecord) -> np.ndarray:
    """What was neither dropped nor passed over, `(N,)` bool."""
    return record.table["reason"].astype(str) == ""


def _refuse_rebuilt(record: RunRecord) -> None:
    for described in record.summary["methods"]:
        try:
            rebuilds = "rebuild" in create_method(**described).hooks
        except (ValueError, TypeError):
            # A method of another package, or one that was given an object: it is what it says it is.
            continue
        if rebuilds:
            raise ValueError(
                f"{described['name']!r} has trained on rows of its own making, which are no rows of the dataset: "
                "`dsel build` writes such a dataset."
            )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dsel export", description=COMMANDS["export"], allow_abbrev=False)
    parser.add_argument("run_dir", help="output folder of a finished run")
    parser.add_argument("--output_file", help="the parquet file to write; default: kept.parquet in the folder")
    parser.add_argument("--dataset_name", help="the rows of the run; default: where the run has read them")
    parser.add_argument("--dataset_train_split", help="their split; default: the run's")
    parser.add_argument("--all", action="store_true", help="write the dropped rows too, with their reasons")
    return parser
