"""Charts as inline SVG: colours and letters come from the page's style, so that they follow it into the dark."""

from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

WIDTH, HEIGHT = 560, 260
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 38
# Points of a line: more than a screen shows.
POINTS = 400


def number(value: float) -> str:
    """A number as short as it can be read."""
    if not np.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    if abs(value) >= 1e5 or abs(value) < 1e-3:
        return f"{value:.2g}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers inside of [low, high], about `count` of them."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    unit = 10.0 ** np.floor(np.log10(raw))
    step = unit * next(factor for factor in (1, 2, 2.5, 5, 10) if factor * unit >= raw * 0.999)
    first = np.ceil(low / step - 1e-9)
    return [float(k * step) for k in np.arange(first, np.floor(high / step + 1e-9) + 1)]


class Axes:
    """The frame of one chart: where values lie on the paper."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float], x_name: str, y_name: str) -> None:
        self.x = x if x[1] > x[0] else (x[0] - 0.5, x[0] + 0.5)
        self.y = y if y[1] > y[0] else (y[0] - 0.5, y[0] + 0.5)
        self.names = x_name, y_name
        self.marks: list[str] = []
        self.legend: list[tuple[str, str]] = []

    def at(self, x: np.ndarray | float, y: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
        across = LEFT + (np.asarray(x, float) - self.x[0]) / (self.x[1] - self.x[0]) * (WIDTH - LEFT - RIGHT)
        up = HEIGHT - BOTTOM - (np.asarray(y, float) - self.y[0]) / (self.y[1] - self.y[0]) * (HEIGHT - TOP - BOTTOM)
        return across, up

    def path(self, x: np.ndarray, y: np.ndarray, kind: str, close: bool = False) -> None:
        across, up = self.at(x, y)
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(across, up, strict=True))
        shape = "polygon" if close else "polyline"
        self.marks.append(f'<{shape} class="{kind}" points="{points}"/>')

    def box(self, x0: float, x1: float, y0: float, y1: float, kind: str, title: str) -> None:
        (left, right), (low, high) = self.at(np.array([x0, x1]), np.array([y0, y1]))
        width, height = max(right - left - 0.6, 0.4), low - high
        if height > 0:
            self.marks.append(
                f'<rect class="{kind}" x="{left:.1f}" y="{high:.1f}" width="{width:.1f}" height="{height:.1f}">'
                f"<title>{escape(title)}</title></rect>"
            )

    def svg(self, label: str) -> str:
        """The chart, with its legend above it."""
        parts = []
        for value in ticks(*self.y, count=4):
            _, up = self.at(self.x[0], value)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{up:.1f}" y2="{up:.1f}"/>')
            parts.append(
                f'<text class="tick" x="{LEFT - 7}" y="{up + 4:.1f}" text-anchor="end">{number(value)}</text>'
            )
        for value in ticks(*self.x):
            across, _ = self.at(value, self.y[0])
            parts.append(
                f'<text class="tick" x="{across:.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">'
                f"{number(value)}</text>"
            )
        x_name, y_name = map(escape, self.names)
        base = HEIGHT - BOTTOM
        parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
        middle = (LEFT + WIDTH - RIGHT) / 2
        parts.append(f'<text class="name" x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">{x_name}</text>')
        legend = "".join(f'<span><i class="{kind}"></i>{escape(text)}</span>' for kind, text in self.legend)
        above = f'<p class="legend"><b>{y_name}</b>{legend}</p>'
        picture = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
        return f"{above}{picture}{''.join(parts)}{''.join(self.marks)}</svg>"


def _thinned(count: int) -> np.ndarray:
    return np.unique(np.linspace(0, count - 1, min(count, POINTS)).round().astype(int))


def _range(values: Sequence[np.ndarray], zero: bool = False) -> tuple[float, float]:
    joined = np.concatenate([np.asarray(v, float).ravel() for v in values]) if values else np.zeros(1)
    joined = joined[np.isfinite(joined)]
    if not len(joined):
        return 0.0, 1.0
    low, high = float(joined.min()), float(joined.max())
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    room = 0.06 * (high - low)
    return (low - (0 if zero and low == 0 else room), high + room) if high > low else (low - 0.5, high + 0.5)


def lines(series: Mapping[str, tuple[np.ndarray, np.ndarray]], y_name: str, label: str, *, zero: bool = False) -> str:
    """Lines over optimizer steps: of each name, its steps and values, both `(n,)`."""
    axes = Axes(_range([x for x, _ in series.values()]), _range([y for _, y in series.values()], zero), "step", y_name)
    axes.x = (min(float(x.min()) for x, _ in series.values()), max(float(x.max()) for x, _ in series.values()))
    axes.x = axes.x if axes.x[1] > axes.x[0] else (axes.x[0] - 1, axes.x[0] + 1)
    for place, (name, (x, y)) in enumerate(series.items()):
        known = np.flatnonzero(np.isfinite(y))
        known = known[_thinned(len(known))] if len(known) else known
        axes.path(x[known], y[known], f"line c{place % 8}")
        if len(known) == 1:
            across, up = axes.at(x[known[0]], y[known[0]])
            axes.marks.append(f'<circle class="dot c{place % 8}" cx="{across:.1f}" cy="{up:.1f}" r="3.5"/>')
        if len(series) > 1:
            axes.legend.append((f"c{place % 8}", name))
    return axes.svg(label)


def band(steps: np.ndarray, low: np.ndarray, middle: np.ndarray, high: np.ndarray, y_name: str, label: str) -> str:
    """A median with the range from 10% to 90% around it, over optimizer steps; all `(n,)`."""
    axes = Axes((float(steps[0]), float(steps[-1])), _range([low, high]), "step", y_name)
    at = _thinned(len(steps))
    axes.path(np.r_[steps[at], steps[at][::-1]], np.r_[low[at], high[at][::-1]], "area c0", close=True)
    axes.path(steps[at], middle[at], "line c0")
    axes.legend = [("c0", "median"), ("area c0", "10% to 90%")]
    return axes.svg(label)


def shares(edges: np.ndarray, counts: Mapping[str, np.ndarray], label: str, x_name: str = "step") -> str:
    """Shares that add up to 1 in each interval between `edges` `(n + 1,)`; of each name its counts `(n,)`."""
    total = np.sum(list(counts.values()), axis=0)
    axes = Axes((float(edges[0]), float(edges[-1])), (0.0, 1.0), x_name, "share")
    below = np.zeros(len(edges) - 1)
    for place, (name, count) in enumerate(counts.items()):
        share = np.divide(count, total, out=np.zeros(len(below)), where=total > 0)
        for i in np.flatnonzero(total):
            axes.box(
                edges[i], edges[i + 1], below[i], below[i] + share[i], f"fill c{place % 8}", f"{name}: {share[i]:.1%}"
            )
        below = below + share
        axes.legend.append((f"c{place % 8}", name))
    return axes.svg(label)


def histogram(groups: Mapping[str, np.ndarray], x_name: str, label: str, bins: int = 40) -> str:
    """Stacked histogram of values by the name of their group; the outermost 1% are put into the first and last bar."""
    values = [np.asarray(v, float)[np.isfinite(v)] for v in groups.values()]
    known = np.concatenate(values) if values else np.empty(0)
    if not len(known):
        return '<p class="empty">nothing is known</p>'
    low, high = np.quantile(known, [0.01, 0.99])
    if not high > low:
        low, high = float(known.min()), float(known.max())
    edges = np.linspace(low, high, bins + 1) if high > low else np.linspace(low - 0.5, low + 0.5, bins + 1)
    counts = [np.histogram(np.clip(v, edges[0], edges[-1]), edges)[0] for v in values]
    axes = Axes((edges[0], edges[-1]), (0.0, float(np.sum(counts, axis=0).max()) * 1.05), x_name, "examples")
    below = np.zeros(bins)
    for place, (name, count) in enumerate(zip(groups, counts, strict=True)):
        for i in np.flatnonzero(count):
            title = f"{name}: {count[i]} from {number(edges[i])} to {number(edges[i + 1])}"
            axes.box(edges[i], edges[i + 1], below[i], below[i] + count[i], f"fill c{place % 8}", title)
        below = below + count
        axes.legend.append((f"c{place % 8}", f"{name} ({len(values[place]):,})"))
    return axes.svg(label)
