"""The picture of a run."""

from pathlib import Path
from typing import Any

import numpy as np

from ..data.files import replacing
from .record import RunRecord


def draw_run(path: Path, record: RunRecord) -> None:
    """
    One picture of a run: the scores over time, what was kept and dropped by the score that decided, and what was up-
    and down-weighted.

    Needs matplotlib (`pip install "dsel-trl[report]"`).
    """
    # The object-oriented interface leaves pyplot's global state and backend alone.
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    summary, names = record.summary, record.methods
    score = next((name for name in names if name in record.scores), "loss")
    # Names are text: a dollar sign in one begins no formula.
    with rc_context({"text.parse_math": False}):
        figure = Figure(figsize=(13, 4), layout="constrained")
        FigureCanvasAgg(figure)
        over_time, kept, weights = figure.subplots(1, 3)
        figure.suptitle(" + ".join(names) + f" · {summary['trainer']} · {summary['steps']} steps")
        _draw_over_time(over_time, record.history, score)
        _draw_kept(kept, record)
        _draw_weights(weights, record)
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png", dpi=110)


def _draw_over_time(axis: Any, history: list[dict[str, float]], score: str) -> None:
    rows = [row for row in history if f"{score}_q50" in row]
    axis.set_title("score of the trained examples over time")
    axis.set_xlabel("optimizer step")
    if rows:
        steps = [row["step"] for row in rows]
        low, middle, high = ([row[f"{score}_q{q}"] for row in rows] for q in (10, 50, 90))
        axis.fill_between(steps, low, high, alpha=0.25, label="10% to 90%")
        axis.plot(steps, middle, label="median")
        axis.set_ylabel(score)
    else:
        rows = [row for row in history if "weighted_loss" in row]
        axis.plot([row["step"] for row in rows], [row["weighted_loss"] for row in rows], label="weighted loss")
        axis.set_ylabel("weighted loss")
    axis.legend(frameon=False)


def _draw_kept(axis: Any, record: RunRecord) -> None:
    axis.set_title("examples kept and dropped at the end")
    axis.set_ylabel("examples")
    (score, values), dropped = record.deciding, record.dropped
    axis.set_xlabel(f"{score} (what decided last)" if score else "score")
    known = np.isfinite(values)
    if not known.any():
        axis.bar(["kept", "dropped"], [int((~dropped).sum()), int(dropped.sum())], color=["C0", "C1"])
        return
    low, high = np.quantile(values[known], [0.01, 0.99])
    bins = np.linspace(low, high if high > low else low + 1.0, 41)
    clipped = np.clip(values, bins[0], bins[-1])
    groups = [clipped[known & ~dropped], clipped[known & dropped]]
    without = int((~known).sum())
    if without:
        axis.set_xlabel(f"{score} (what decided last; {without:,} had no score)")
    axis.hist(groups, bins=bins, stacked=True, label=[f"kept ({len(groups[0]):,})", f"dropped ({len(groups[1]):,})"])
    axis.legend(frameon=False)


def _draw_weights(axis: Any, record: RunRecord) -> None:
    axis.set_title("last gradient weight of the trained examples")
    axis.set_xlabel("weight")
    axis.set_ylabel("examples")
    values = record.weights[np.isfinite(record.weights)]
    if not len(values):
        axis.text(0.5, 0.5, "no example was weighted", ha="center", va="center", transform=axis.transAxes)
        return
    bins = np.linspace(min(0.0, values.min()), max(values.max(), 1.0) + 1e-6, 41)
    axis.hist(
        [values[values < 1], values[values >= 1]],
        bins=bins,
        stacked=True,
        label=[f"below 1 ({(values < 1).sum()})", f"1 or more ({(values >= 1).sum()})"],
    )
    axis.legend(frameon=False)
