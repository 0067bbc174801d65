"""`dsel report`: what runs have kept, dropped and weighted, as one page that needs nothing else, and as pictures."""

import argparse
import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from tqdm.auto import tqdm

from ..data.files import replacing
from ..report.html import page
from ..report.picture import draw_run
from ..report.record import RunRecord, read_stream
from . import COMMANDS
from .run_data import row_texts, rows_of, text_values

logger = logging.getLogger(__name__)

# Columns by which a page shows the composition of a run, where a dataset has them and they have few values.
MARKS = ("label", "source", "domain", "subset", "category", "language", "truth_flipped")
MOST_VALUES, MOST_COLUMNS = 50, 3


def report_runs(words: Sequence[str]) -> str:
    """
    Runs `dsel report RUN_DIR... [--output_file FILE]`.

    Args:
        words (`Sequence[str]`):
            The words after `dsel report`.

    Returns:
        `str`: what is to be printed.

    Raises:
        `FileNotFoundError`: if a folder holds no finished run, or there is no such dataset.
        `ValueError`: for an unknown word, or a column that a dataset does not have.
    """
    asked, unknown = _parser().parse_known_args(list(words))
    if unknown:
        raise ValueError(f"Unexpected word {unknown[0]!r}. See `dsel report --help`.")
    if asked.examples < 0:
        raise ValueError(f"examples={asked.examples!r} must be 0 or more.")
    folders = [Path(folder) for folder in asked.run_dir]
    streams, runs = _streams(folders)
    records = _named([RunRecord.read(folder) for folder in runs])
    examples: list[dict[str, Any]] = []
    columns: list[dict[str, np.ndarray]] = []
    notes = []
    for place, record in enumerate(tqdm(records, desc="Reading runs")):
        rows = None
        try:
            rows = rows_of(record, asked.dataset_name, asked.dataset_train_split)
        except (ValueError, OSError) as error:
            # The page is of use without the texts, unless somebody has said where they are.
            if asked.dataset_name is not None or asked.by:
                raise
            notes.append(f"{record.name}: no texts are shown. {error}")
            logger.warning(notes[-1])
        examples += _examples(record, rows, place, asked.examples)
        columns.append({} if rows is None else _columns(record, rows, asked.by))
    file = Path(asked.output_file) if asked.output_file else folders[0] / "report.html"
    with replacing(file) as temporary:
        temporary.write_text(page(records, examples, columns, notes, streams), encoding="utf-8")
    return "\n".join([f"Report: {file}", *(f"Picture: {path}" for path in _pictures(file, records))])


def _streams(folders: Sequence[Path]) -> tuple[dict[str, dict[str, Any]], list[Path]]:
    """Summaries of the runs with stages by name, and the folders of all runs: of those, the stages that chose."""
    streams: dict[str, dict[str, Any]] = {}
    runs: list[Path] = []
    for folder in folders:
        summary = read_stream(folder)
        if summary is None:
            runs.append(folder)
            continue
        name = folder.resolve().name
        streams[name if name not in streams else f"{name} ({len(streams) + 1})"] = summary
        stages = sorted(folder.glob("stage-*"), key=lambda path: int(path.name.split("-")[1]))
        runs += [path for path in stages if (path / "selection" / "ledger.parquet").is_file()]
    return streams, runs


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dsel report", description=COMMANDS["report"], allow_abbrev=False)
    parser.add_argument("run_dir", nargs="+", help="output folder of a finished run; several are shown side by side")
    parser.add_argument("--output_file", help="the page; default: report.html in the first folder")
    parser.add_argument("--dataset_name", help="the rows of the runs; default: where each run has read them")
    parser.add_argument("--dataset_train_split", help="their split; default: the run's")
    parser.add_argument(
        "--by",
        action="append",
        default=[],
        metavar="COLUMN",
        help=f"show the composition by this column (default: {', '.join(MARKS)}, where they are)",
    )
    parser.add_argument("--examples", type=int, default=200, help="examples of each sort and run on the page")
    return parser


def _named(records: list[RunRecord]) -> list[RunRecord]:
    """Runs of the same name are told apart by a number."""
    names = [record.name for record in records]
    for i, record in enumerate(records):
        if names.count(names[i]) > 1:
            record.name = f"{names[i]} ({names[: i + 1].count(names[i])})"
    return records


def _pictures(page_file: Path, records: list[RunRecord]) -> list[Path]:
    if importlib.util.find_spec("matplotlib") is None:
        logger.info('No pictures were drawn: pip install "dsel-trl[report]" to get them.')
        return []
    found = []
    for i, record in enumerate(records):
        number = f"-{i + 1}" if len(records) > 1 else ""
        found.append(page_file.with_name(f"{page_file.stem}{number}.png"))
        draw_run(found[-1], record)
    return found


def _columns(record: RunRecord, rows: Dataset, asked: Sequence[str]) -> dict[str, np.ndarray]:
    """Values of the columns by which the composition is shown."""
    missing = [name for name in asked if name not in rows.column_names]
    if missing:
        raise ValueError(f"by={missing[0]!r}: there is no such column, only {sorted(rows.column_names)}.")
    logged = list(record.summary.get("log_by", {}))
    names = asked or [name for name in dict.fromkeys([*logged, *MARKS]) if name in rows.column_names]
    found = {name: text_values(rows, name, record.table["id"]) for name in names}
    if asked:
        return found
    few = {name: values for name, values in found.items() if 1 < len(np.unique(values)) <= MOST_VALUES}
    return dict(list(few.items())[:MOST_COLUMNS])


def _examples(record: RunRecord, rows: Dataset | None, place: int, most: int) -> list[dict[str, Any]]:
    """The examples to look at: dropped ones, those that were passed over, and those with the extreme weights."""
    table = record.table
    weights, visited = record.weights, record.visits > 0
    known = np.flatnonzero(np.isfinite(weights) & visited)
    by_weight = known[np.argsort(-weights[known], kind="stable")]
    varied = len(known) > 0 and np.ptp(weights[known]) > 0
    passed = (table["reason"].astype(str) != "") & ~record.dropped
    kept = np.flatnonzero(visited & ~record.dropped)
    sorts = {
        "dropped": _spread(np.flatnonzero(record.dropped), table["decision_score"], most),
        "not picked": _spread(np.flatnonzero(passed), table["decision_score"], most),
        "largest weight": by_weight[:most] if varied else by_weight[:0],
        "smallest weight": by_weight[::-1][: min(most, len(by_weight) // 2)] if varied else by_weight[:0],
        "kept": _spread(kept, table["decision_score"], most // 4),
    }
    found = []
    for kind, positions in sorts.items():
        said = [] if rows is None else rows.select(table["id"][positions])
        texts = [row_texts(row) for row in said] if rows is not None else [[] for _ in positions]
        for position, text in zip(positions.tolist(), texts, strict=True):
            found.append(
                {
                    "run": place,
                    "id": int(table["id"][position]),
                    "kind": kind,
                    "score": float(table["decision_score"][position]),
                    "by": str(table["decided_by"][position]),
                    "step": int(table["decision_step"][position]),
                    "weight": float(weights[position]),
                    "visits": int(table["visits"][position]),
                    "reason": str(table["reason"][position]),
                    "texts": text,
                }
            )
    return found


def _spread(positions: np.ndarray, scores: np.ndarray, most: int) -> np.ndarray:
    """At most `most` of some positions, evenly over their scores, in the order of these."""
    order = positions[np.argsort(scores[positions], kind="stable")]
    if len(order) <= most:
        return order
    return order[np.unique(np.linspace(0, len(order) - 1, most).round().astype(int))] if most else order[:0]
