"""The page of one or several runs: one file that needs nothing else, in which all text of a dataset is only text."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

import numpy as np

from ..core.costs import WORK, all_forwards
from . import charts
from .record import RunRecord

# Intervals of a picture of shares over time.
SLICES = 24
# Values of a column that are shown apart; the rest are one.
APART = 7


def page(
    records: Sequence[RunRecord],
    examples: Sequence[dict[str, Any]],
    columns: Sequence[dict[str, np.ndarray]],
    notes: Sequence[str] = (),
    streams: Mapping[str, dict[str, Any]] | None = None,
) -> str:
    """
    The report as HTML.

    Args:
        records (`Sequence[RunRecord]`):
            The runs, to be shown side by side.
        examples (`Sequence[dict]`):
            Examples to look at: `run` (a position in `records`), `id`, `kind`, `score`, `by`, `step`, `weight`,
            `visits`, `reason`, and `texts`, a list of (name, text).
        columns (`Sequence[dict[str, np.ndarray]]`):
            Of each run the values of some columns of its dataset by name, `(N,)` texts each.
        notes (`Sequence[str]`, *optional*):
            Lines for the top of the page.
        streams (`Mapping[str, dict]`, *optional*):
            Of runs with `stages`, by name, `summary.json`: the forgetting tables come first.

    Returns:
        `str`: the whole file.
    """
    style = files(__package__).joinpath("page.css").read_text(encoding="utf-8")
    script = files(__package__).joinpath("page.js").read_text(encoding="utf-8")
    title = " · ".join([*(streams or {}), *(record.title for record in records)])
    # In a script element only `<` can end it, or begin a comment.
    data = json.dumps({"runs": [r.name for r in records], "examples": [_plain(e) for e in examples]}, allow_nan=False)
    body = [
        "<header><p class='kicker'>dsel report</p>",
        f"<h1>{escape(title)}</h1>",
        "".join(f"<p class='note'>{escape(note)}</p>" for note in notes),
        "</header><main>",
        *(_stream(name, summary) for name, summary in (streams or {}).items()),
        _comparison(records) if len(records) > 1 else "",
        "<div class='runs'>",
        *(_run(record, values, len(records) > 1) for record, values in zip(records, columns, strict=True)),
        "</div>",
        _examples(records) if examples else "",
        "</main>",
    ]
    return (
        "<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'; style-src 'unsafe-inline'; "
        "script-src 'unsafe-inline'\">"
        f"<title>{escape(title)}</title><style>{style}</style></head><body>{''.join(body)}"
        f"<script type='application/json' id='data'>{data.replace('<', chr(92) + 'u003c')}</script>"
        f"<script>{script}</script></body></html>\n"
    )


def _plain(example: dict[str, Any]) -> dict[str, Any]:
    """Numbers as JSON has them: what is not known is null, and what is infinite a word."""

    def value(found: Any) -> Any:
        if isinstance(found, float) and not np.isfinite(found):
            return None if np.isnan(found) else str(found)
        return found

    return {key: value(found) for key, found in example.items()}


# ---- One run ----


def _run(record: RunRecord, columns: dict[str, np.ndarray], several: bool) -> str:
    heading = f"<h2>{escape(record.name)}</h2><p class='sub'>{escape(record.title)}</p>" if several else ""
    notes = "".join(f"<li>{escape(note)}</li>" for note in record.summary.get("notes", []))
    return "".join(
        (
            f"<section class='run'>{heading}{_tiles(record)}",
            f"<ul class='notes'>{notes}</ul>" if notes else "",
            "<div class='cards'>",
            *(_card(name, what, chart) for name, what, chart in _charts(record, columns) if chart),
            "</div><div class='cards'>",
            _card("Why examples were left out", "", _reasons(record)),
            _card("What selection cost", "", _cost(record)),
            _card("Methods", "", _methods(record)),
            "</div></section>",
        )
    )


def _card(name: str, what: str, inside: str, kind: str = "card") -> str:
    under = f"<p class='sub'>{escape(what)}</p>" if what else ""
    return f"<article class='{kind}'><h3>{escape(name)}</h3>{under}{inside}</article>" if inside else ""


def _tiles(record: RunRecord) -> str:
    size, visited = len(record.visits), int((record.visits > 0).sum())
    weights = record.weights[np.isfinite(record.weights)]
    tiles = [
        (f"{visited:,}", f"of {size:,} examples trained on ({visited / max(size, 1):.0%})"),
        (f"{int(record.dropped.sum()):,}", "dropped at the end"),
        (f"{record.summary['steps']:,}", f"optimizer steps of {record.summary['trainer']}"),
        (f"{all_forwards(record.summary.get('cost', {})):,}", "forwards that selection added"),
    ]
    if len(weights):
        tiles.append(
            (f"{charts.number(float(weights.min()))} to {charts.number(float(weights.max()))}", "gradient weights")
        )
    tokens = record.summary.get("tokens_skipped")
    if tokens:
        tiles.append((f"{tokens:,}", "tokens not trained on"))
    inside = "".join(f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for value, name in tiles)
    return f"<div class='tiles'>{inside}</div>"


def _charts(record: RunRecord, columns: dict[str, np.ndarray]) -> list[tuple[str, str, str]]:
    name, values = record.deciding
    dropped = record.dropped
    groups = {"kept": values[~dropped], "dropped": values[dropped]}
    found = [
        (
            "What was kept and what was dropped",
            "by the score that decided, at the end of the run",
            charts.histogram(
                {k: v for k, v in groups.items() if len(v)}, name or "score", "kept and dropped by score"
            ),
        )
    ]
    found += [("Score over time", "of the trained examples", _band(record, score)) for score in _over_time(record)]
    steps, kept = _history(record, "kept_fraction")
    found.append(
        (
            "Share kept",
            "of the examples, at the last plan",
            charts.lines({"kept": (steps, kept)}, "share", "kept", zero=True),
        )
        if len(steps)
        else ("", "", "")
    )
    known = record.weights[np.isfinite(record.weights)]
    if len(known):
        halves = {"below 1": known[known < 1], "1 or more": known[known >= 1]}
        found.append(
            ("Weights", "last gradient weight of each example", charts.histogram(halves, "weight", "weights"))
        )
        steps, size = _history(record, "effective_sample_size")
        if len(steps):
            chart = charts.lines({"size": (steps, size)}, "examples", "effective sample size", zero=True)
            found.append(("Effective sample size", "how many equal weights a step's are worth", chart))
    found.append(("Length over time", "tokens of the trained examples", _band(record, "length")))
    found.append(("When examples were last trained", "", _when(record)))
    for column, texts in columns.items():
        found.append(
            (f"Composition by {column}", "of the examples by the step that trained them last", _mix(record, texts))
        )
        found.append((f"Kept by {column}", "", _fate(record, texts)))
    return found


def _history(record: RunRecord, key: str) -> tuple[np.ndarray, np.ndarray]:
    rows = [row for row in record.history if key in row]
    return np.array([row["step"] for row in rows], float), np.array([row[key] for row in rows], float)


def _over_time(record: RunRecord) -> list[str]:
    """Scores whose quantiles were logged, those of the methods first; at most three."""
    names = dict.fromkeys(key.removesuffix("_q50") for row in record.history for key in row if key.endswith("_q50"))
    own = [name for name in names if name in record.methods]
    return [name for name in [*own, *(n for n in names if n not in own)] if name != "length"][:3]


def _band(record: RunRecord, score: str) -> str:
    rows = [row for row in record.history if f"{score}_q50" in row]
    if not rows:
        return ""
    low, middle, high = (np.array([row[f"{score}_q{q}"] for row in rows], float) for q in (10, 50, 90))
    steps = np.array([row["step"] for row in rows], float)
    return charts.band(steps, low, middle, high, score, f"{score} over time")


def _slices(record: RunRecord) -> tuple[np.ndarray, np.ndarray]:
    """Edges of the intervals of steps, and each visited example's interval; -1 where it was not visited."""
    last, steps = record.table["last_step"], max(int(record.summary["steps"]), 1)
    edges = np.unique(np.linspace(0, steps, min(SLICES, steps) + 1).round())
    place = np.clip(np.searchsorted(edges, last, side="left") - 1, 0, len(edges) - 2)
    return edges, np.where(record.visits > 0, place, -1)


def _when(record: RunRecord) -> str:
    visited = record.visits > 0
    return charts.histogram({"examples": record.table["last_step"][visited]}, "step", "last visit", bins=SLICES)


def _values(texts: np.ndarray) -> dict[str, np.ndarray]:
    """Where a column has each of its most frequent values, `(N,)` bool each; the rest together."""
    names, counts = np.unique(texts, return_counts=True)
    first = names[np.argsort(-counts, kind="stable")][:APART].tolist()
    found = {str(name): texts == name for name in sorted(first)}
    if len(names) > APART:
        found["others"] = ~np.isin(texts, first)
    return found


def _mix(record: RunRecord, texts: np.ndarray) -> str:
    edges, place = _slices(record)
    counts = {
        name: np.bincount(place[own & (place >= 0)], minlength=len(edges) - 1).astype(float)
        for name, own in _values(texts).items()
    }
    return charts.shares(edges, counts, "composition over time")


def _fate(record: RunRecord, texts: np.ndarray) -> str:
    rows = []
    for name, own in _values(texts).items():
        size = max(int(own.sum()), 1)
        weights = record.weights[own & np.isfinite(record.weights)]
        rows.append(
            (
                name,
                f"{int(own.sum()):,}",
                _meter(float((own & (record.visits > 0)).sum()) / size),
                _meter(float((own & record.dropped).sum()) / size, "c1"),
                charts.number(float(weights.mean())) if len(weights) else "–",
            )
        )
    return _table(("value", "examples", "trained on", "dropped", "mean weight"), rows)


def _meter(share: float, kind: str = "c0") -> tuple[str, str]:
    """A share as a bar beside its figure: HTML, and so a pair, which `_table` leaves as it is."""
    return "html", f"<span class='meter'><i class='{kind}' style='width:{share:.1%}'></i></span>{share:.1%}"


def _reasons(record: RunRecord) -> str:
    reasons = record.table["reason"].astype(str)
    out = reasons != ""
    if not out.any():
        return "<p class='empty'>nothing was left out</p>"
    names, counts = np.unique(reasons[out], return_counts=True)
    rows = []
    for i in np.argsort(-counts, kind="stable"):
        scores = record.table["decision_score"][reasons == names[i]]
        known = scores[np.isfinite(scores)]
        reach = f"{charts.number(float(known.min()))} to {charts.number(float(known.max()))}" if len(known) else "–"
        steps = record.table["decision_step"][reasons == names[i]]
        when = (
            f"{int(steps.min()):,} to {int(steps.max()):,}" if len(set(steps.tolist())) > 1 else f"{int(steps[0]):,}"
        )
        rows.append((str(names[i]), f"{counts[i]:,}", reach, when if steps.max() >= 0 else "–"))
    return _table(("reason", "examples", "their scores", "decided at step"), rows)


def _cost(record: RunRecord) -> str:
    cost = record.summary.get("cost", {})
    rows = [
        (what.replace("_", " "), f"{cost[what]:,}", f"{cost.get(tokens, 0):,}")
        for what, tokens in WORK.items()
        if cost.get(what)
    ]
    rows += [
        (name.replace("_", " "), f"{cost[name]:,}", "–") for name in ("helper_runs", "helper_steps") if cost.get(name)
    ]
    seconds = (
        f"<p class='sub'>{cost['seconds']:,} seconds of selection in the first process</p>"
        if "seconds" in cost
        else ""
    )
    if not rows:
        return f"<p class='empty'>no model was asked for it</p>{seconds}"
    return _table(("what", "examples", "tokens"), rows) + seconds


def _methods(record: RunRecord) -> str:
    rows = [
        (method["name"], ", ".join(f"{key}={value}" for key, value in method.items() if key != "name"))
        for method in record.summary["methods"]
    ]
    return _table(("method", "parameters"), rows, "words")


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]], kind: str = "numbers") -> str:
    def cell(value: Any) -> str:
        return value[1] if isinstance(value, tuple) else escape(str(value))

    names = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = "".join("<tr>" + "".join(f"<td>{cell(value)}</td>" for value in row) + "</tr>" for row in rows)
    inside = f"<thead><tr>{names}</tr></thead><tbody>{lines}</tbody>"
    return f"<div class='scroll'><table class='{kind}'>{inside}</table></div>"


# ---- A run with stages ----


def _stream(name: str, summary: dict[str, Any]) -> str:
    """What each stage has left of the ones before: a line per stage trained, a column per stage judged."""
    stages = [stage["name"] for stage in summary["stages"]]
    methods = " + ".join(method["name"] for method in summary["methods"] or [{"name": "no selection"}])
    under = f"{methods}, replay {summary['replay']}, seed {summary['seed']}"
    cards = []
    for measure, form in (("loss", "{:.4f}"), ("accuracy", "{:.1%}")):
        if measure not in summary:
            continue
        found = summary[measure]
        rows = [
            (stage, *("" if value is None else form.format(value) for value in values))
            for stage, values in zip(stages, found["table"], strict=True)
        ]
        means = f"mean at the end {form.format(found['final_mean'])}, forgotten {form.format(found['forgetting'])}"
        cards.append(_card(f"{measure.capitalize()} after each stage", means, _table(("after", *stages), rows)))
    trained = [
        (stage["name"], *(f"{stage[key]:,}" for key in ("pool", "steps", "tokens", "dropped_for_good")))
        for stage in summary["stages"]
    ]
    cards.append(_card("Stages", "", _table(("stage", "pool", "steps", "tokens", "dropped for good"), trained)))
    heading = f"<h2>{escape(name)}</h2><p class='sub'>{escape(under)}</p>"
    return f"<section class='together'>{heading}<div class='cards'>{''.join(cards)}</div></section>"


# ---- All of them ----


def _comparison(records: Sequence[RunRecord]) -> str:
    rows = []
    for record in records:
        size, visited = max(len(record.visits), 1), int((record.visits > 0).sum())
        cost = record.summary.get("cost", {})
        rows.append(
            (
                record.name,
                record.title,
                _meter(visited / size),
                _meter(float(record.dropped.sum()) / size, "c1"),
                f"{record.summary['steps']:,}",
                f"{all_forwards(cost):,}",
                f"{cost.get('seconds', 0):,}",
            )
        )
    head = ("run", "methods", "trained on", "dropped", "steps", "added forwards", "seconds of selection")
    cards = [_card("Side by side", "", _table(head, rows), "card whole")]
    for key, name in (("kept_fraction", "share kept"), ("weighted_loss", "weighted loss")):
        series = {record.name: _history(record, key) for record in records}
        series = {run: found for run, found in series.items() if len(found[0])}
        if series:
            cards.append(_card(name.capitalize(), "", charts.lines(series, name, name, zero=key == "kept_fraction")))
    return f"<section class='together'><div class='cards'>{''.join(cards)}</div></section>"


def _examples(records: Sequence[RunRecord]) -> str:
    runs = "".join(f"<option value='{i}'>{escape(record.name)}</option>" for i, record in enumerate(records))
    which = f"<select id='run' aria-label='run'><option value=''>all runs</option>{runs}</select>"
    which = which if len(records) > 1 else ""
    return (
        "<section class='examples'><h2>Examples</h2><div class='bar'>"
        "<input id='search' type='search' placeholder='search in texts, ids and reasons' aria-label='search'>"
        f"<select id='kind' aria-label='kind'><option value=''>all</option></select>{which}"
        "<span id='count'></span></div><div id='list'></div><button id='more' hidden>show more</button></section>"
    )
