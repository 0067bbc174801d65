"""The table of an ablation: as text, CSV, JSON, Markdown and a picture."""

import csv
import importlib.util
import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..core.costs import WORK
from ..core.randomness import stream
from ..data.files import replacing, write_json
from ..functional.evidence import dense_rank, efficiency, feasibility_ranks, improvement_ratio
from ..functional.resampling import bootstrap_interval

logger = logging.getLogger(__name__)

STOCK = "stock"


@dataclass
class Row:
    """
    One variant of an ablation.

    Attributes:
        variant (`str`):
            Its name.
        flip (`float`, *optional*):
            Share of the training pairs whose label was turned.
        results (`list[dict]`):
            What came of each seed that was finished, with its `seconds`.
        failed (`list[int]`):
            Seeds that failed.
        control (`str`, *optional*):
            The random choice of the same share.
    """

    variant: str
    flip: float | None
    results: list[dict[str, Any]]
    failed: list[int]
    control: str | None = None

    @property
    def by_seed(self) -> dict[int, dict[str, Any]]:
        return {result["seed"]: result for result in self.results}

    def mean(self, key: str) -> float:
        """Mean of a value over the seeds that have it, NaN where none has."""
        values = [result[key] for result in self.results if key in result]
        return float(np.mean(values)) if values else float("nan")


def summary_of(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """
    What the table says of each row, in numbers and without seconds: the same seeds give the same.

    A paired difference is that of the same seed; its interval is a bootstrap over the seeds
    ([`~dsel_trl.functional.resampling.bootstrap_interval`]). `compute` is all floating-point operations, selection's
    among them, as a multiple of stock's.
    """
    found = []
    of = {(row.variant, row.flip): row for row in rows}
    for row in rows:
        values = [result["metric"] for result in row.results]
        entry: dict[str, Any] = {
            "variant": row.variant,
            "flip": row.flip,
            "seeds": sorted(row.by_seed),
            "failed": row.failed,
            "mean": row.mean("metric"),
            "deviation": float(np.std(values, ddof=1)) if len(values) > 1 else float("nan"),
        }
        for name, other in (("stock", of.get((STOCK, row.flip))), ("random", of.get((row.control or "", row.flip)))):
            entry.update({f"against_{name}{key}": value for key, value in _difference(row, other).items()})
        stock = of.get((STOCK, row.flip))
        base = float("nan") if stock is None else stock.mean("training_flops")
        for key in ("kept_fraction", "selected_fraction", "steps", "tokens", "training_flops", "selection_flops"):
            entry[key] = row.mean(key)
        entry["scored_tokens"] = float(np.mean([_scored(r) for r in row.results])) if row.results else float("nan")
        entry["compute"] = (entry["training_flops"] + entry["selection_flops"]) / base if base else float("nan")
        for key in ("flipped_dropped", "clean_dropped", "flipped_share_of_training"):
            entry[key] = row.mean(key)
        found.append(entry)
    _survey(rows, found)
    return found


def _scored(result: Mapping[str, Any]) -> int:
    return sum(result["cost"].get(tokens, 0) for tokens in WORK.values())


def _difference(row: Row, other: Row | None) -> dict[str, float]:
    if other is None or other is row:
        return {"": float("nan"), "_low": float("nan"), "_high": float("nan")}
    mine, theirs = row.by_seed, other.by_seed
    both = sorted(mine.keys() & theirs.keys())
    differences = [mine[seed]["metric"] - theirs[seed]["metric"] for seed in both]
    if not differences or not np.isfinite(differences).all():
        return {"": float("nan"), "_low": float("nan"), "_high": float("nan")}
    low, high = bootstrap_interval(differences, stream(0, "ablation/bootstrap"))
    return {"": float(np.mean(differences)), "_low": low, "_high": high}


def _survey(rows: Sequence[Row], entries: list[dict[str, Any]]) -> None:
    """Adds the measures of a survey (hf.co/papers/2406.14115, section 5) by which selections are compared."""
    finished = [(row, entry) for row, entry in zip(rows, entries, strict=True) if row.results]
    if not finished:
        return
    penalties = ([row.mean(f"{name}_penalty") for row, _ in finished] for name in ("simplicity", "flexibility"))
    for (_, entry), rank in zip(finished, feasibility_ranks(*penalties)[2].tolist(), strict=True):
        entry["feasibility_rank"] = rank
    stock = {row.flip: entry["mean"] for row, entry in finished if row.variant == STOCK}
    # A ratio says something where more is better and nothing is below zero, as with an accuracy.
    known = [(row, e) for row, e in finished if stock.get(row.flip, 0) > 0 and e["mean"] >= 0]
    if not known:
        return
    ratios = [improvement_ratio([entry["mean"]], [stock[row.flip]]) for row, entry in known]
    heights = efficiency([entry["selected_fraction"] for _, entry in known], ratios)
    for (_, entry), ratio, height, rank in zip(
        known, ratios, heights.tolist(), dense_rank(heights, descending=True).tolist(), strict=True
    ):
        entry.update(improvement_ratio=ratio, efficiency=height, efficiency_rank=rank)


# ---- For people ----


def _cells(rows: Sequence[Row], seconds: bool) -> tuple[list[str], list[list[str]]]:
    """Heading and lines of the table, without columns of which nothing is known."""
    entries = summary_of(rows)
    columns: dict[str, list[str]] = {
        "flip": ["" if entry["flip"] is None else f"{entry['flip']:.0%}" for entry in entries],
        "variant": [entry["variant"] for entry in entries],
        "seeds": [_seeds(entry) for entry in entries],
        "mean": [_number(entry["mean"]) for entry in entries],
        "deviation": [_number(entry["deviation"]) for entry in entries],
        "against stock": [_interval(entry, "against_stock") for entry in entries],
        "against random": [_interval(entry, "against_random") for entry in entries],
        "kept": [_share(entry["kept_fraction"]) for entry in entries],
        "flipped dropped": [_share(entry["flipped_dropped"]) for entry in entries],
        "clean dropped": [_share(entry["clean_dropped"]) for entry in entries],
        "steps": [_count(entry["steps"]) for entry in entries],
        "trained tokens": [_count(entry["tokens"]) for entry in entries],
        "scored tokens": [_count(entry["scored_tokens"]) for entry in entries],
        "compute": ["" if np.isnan(entry["compute"]) else f"{entry['compute']:.2f}x" for entry in entries],
    }
    if seconds:
        columns["seconds"] = [_count(row.mean("seconds")) for row in rows]
    columns = {name: cells for name, cells in columns.items() if any(cells)}
    return list(columns), [list(line) for line in zip(*columns.values(), strict=True)]


def _number(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.4f}"


def _share(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.1%}"


def _count(value: float) -> str:
    return "" if np.isnan(value) else f"{value:,.0f}"


def _interval(entry: Mapping[str, Any], key: str) -> str:
    if np.isnan(entry[key]):
        return ""
    if np.isnan(entry[f"{key}_low"]):
        return f"{entry[key]:+.4f}"
    return f"{entry[key]:+.4f} [{entry[f'{key}_low']:+.4f}, {entry[f'{key}_high']:+.4f}]"


def _seeds(entry: Mapping[str, Any]) -> str:
    failed = entry["failed"]
    return f"{len(entry['seeds'])}" + (f" (failed: {', '.join(map(str, failed))})" if failed else "")


def table_of(rows: Sequence[Row], metric: str | None) -> str:
    """The table as text, seconds included."""
    head, lines = _cells(rows, seconds=True)
    widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
    text = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in [head, *lines]]
    return "\n".join([f"metric: {metric}", text[0], "  ".join("-" * width for width in widths), *text[1:]])


def markdown(rows: Sequence[Row], metric: str | None) -> str:
    """The table as Markdown, without seconds."""
    head, lines = _cells(rows, seconds=False)
    table = ["| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines]]
    return "\n".join([f"Metric: `{metric}`", "", *table, ""])


def _csv(entries: Sequence[Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(name for entry in entries for name in entry))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(names)
    for entry in entries:
        writer.writerow([_csv_value(entry.get(name)) for name in names])
    return out.getvalue()


def _csv_value(value: Any) -> Any:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "" if value is None or (isinstance(value, float) and np.isnan(value)) else value


def _known(value: Any) -> Any:
    """A value as JSON has it: what is not known is null."""
    return None if isinstance(value, float) and np.isnan(value) else value


def write_tables(folder: Path, rows: Sequence[Row], metric: str | None, failures: Mapping[str, str]) -> list[Path]:
    """
    Writes `ablation.json`, `.csv`, `.md`, `seconds.json` and, with the `report` extra, `ablation.png` into `folder`.

    All but the seconds are the same, bit for bit, for the same seeds.
    """
    entries = [{key: _known(value) for key, value in entry.items()} for entry in summary_of(rows)]
    clocked = ("seconds", "selection_seconds")
    cells = [{k: v for k, v in result.items() if k not in clocked} for row in rows for result in row.results]
    content = {"metric": metric, "rows": entries, "failures": dict(failures), "cells": cells}
    write_json(folder / "ablation.json", content)
    keys = ("variant", "flip", "seed", *clocked)
    seconds = [{key: result.get(key) for key in keys} for row in rows for result in row.results]
    write_json(folder / "seconds.json", {"cells": seconds})
    files = [folder / f"ablation.{ending}" for ending in ("md", "csv", "json")]
    for file, text in zip(files, (markdown(rows, metric), _csv(entries)), strict=False):
        with replacing(file) as temporary:
            temporary.write_text(text, encoding="utf-8")
    if importlib.util.find_spec("matplotlib") is None:
        logger.info('No picture was drawn: pip install "dsel-trl[report]" to get one.')
        return files
    _draw(folder / "ablation.png", rows, metric)
    return [*files, folder / "ablation.png"]


def _draw(path: Path, rows: Sequence[Row], metric: str | None) -> None:
    """Each variant's mean with its seeds, and its difference to stock with the interval."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    entries = summary_of(rows)
    names = [row.variant if row.flip is None else f"{row.variant} ({row.flip:.0%} flipped)" for row in rows]
    with rc_context({"text.parse_math": False}):
        figure = Figure(figsize=(11, 1.6 + 0.34 * len(rows)), layout="constrained")
        FigureCanvasAgg(figure)
        values, differences = figure.subplots(1, 2, sharey=True)
        for place, (row, entry) in enumerate(zip(rows, entries, strict=True)):
            colour = "C7" if row.variant == STOCK else "C1" if row.variant.startswith("random") else "C0"
            metrics = [result["metric"] for result in row.results]
            values.plot(metrics, [place] * len(metrics), "o", color=colour, alpha=0.35, markersize=4)
            values.plot([entry["mean"]], [place], "D", color=colour, markersize=6)
            if not np.isnan(entry["against_stock"]):
                differences.plot([entry["against_stock"]], [place], "D", color=colour, markersize=6)
                differences.plot([entry["against_stock_low"], entry["against_stock_high"]], [place] * 2, color=colour)
        values.set_yticks(range(len(rows)), names)
        values.invert_yaxis()
        values.set_xlabel(str(metric))
        values.set_title("mean, and each seed")
        differences.axvline(0, color="0.6", linewidth=1)
        differences.set_title("paired difference to stock, 95% interval")
        for axis in (values, differences):
            axis.grid(axis="x", alpha=0.3)
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png", dpi=120, metadata={"Software": None})
