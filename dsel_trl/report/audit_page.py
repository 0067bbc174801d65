"""The page of an audit: one file, ranked, every text of the dataset escaped, nothing loaded from elsewhere."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data.files import replacing

STYLE = """
:root{--back:#fff;--ink:#1b1f24;--soft:#59636e;--line:#d8dee4;--card:#f6f8fa;--drop:#b42318;--flip:#9a6700;--review:#0550ae}
@media(prefers-color-scheme:dark){:root{--back:#0d1117;--ink:#e6edf3;--soft:#9198a1;--line:#30363d;--card:#161b22;
--drop:#ff7b72;--flip:#e3b341;--review:#79c0ff}}
*{box-sizing:border-box}td,p,header span{overflow-wrap:anywhere}th{vertical-align:top}
body{margin:0 auto;max-width:72rem;padding:1.5rem;background:var(--back);color:var(--ink);
font:15px/1.5 system-ui,sans-serif}h1{font-size:1.5rem;margin:0}p{max-width:60rem}.soft{color:var(--soft)}
table{border-collapse:collapse}td,th{padding:.15rem .8rem .15rem 0;text-align:left;font-variant-numeric:tabular-nums}
input,select{font:inherit;padding:.35rem .6rem;border:1px solid var(--line);border-radius:6px;background:var(--back);
color:var(--ink)}.bar{display:flex;gap:.6rem;flex-wrap:wrap;position:sticky;top:0;background:var(--back);padding:
.6rem 0}
article{border:1px solid var(--line);border-radius:8px;margin:.8rem 0;padding:.8rem 1rem;background:var(--card)}
header{display:flex;gap:.8rem;flex-wrap:wrap;align-items:baseline}.tag{font-weight:600}.drop{color:var(--drop)}
.flip{color:var(--flip)}.review{color:var(--review)}.pair{display:grid;grid-template-columns:1fr 1fr;gap:1rem}
.pair>div{min-width:0}
pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:.3rem 0;font:inherit}summary{cursor:pointer;color:var(--soft)}
@media(max-width:44rem){.pair{grid-template-columns:1fr}}svg{max-width:100%;height:auto}
"""
SCRIPT = """
const q=document.getElementById('q'),a=document.getElementById('a');
function f(){const t=q.value.toLowerCase();for(const e of document.querySelectorAll('article'))
e.hidden=!((!a.value||e.dataset.action===a.value)&&(!t||e.textContent.toLowerCase().includes(t)))}
q.oninput=a.onchange=f;
"""


def write_audit_page(
    path: Path,
    title: str,
    facts: Sequence[tuple[str, str]],
    rows: Sequence[Mapping[str, Any]],
    plot: tuple[np.ndarray, np.ndarray, np.ndarray] | None,
    notes: Sequence[str] = (),
) -> None:
    """
    Writes the page; the file appears complete or not at all.

    Args:
        path (`Path`):
            Where.
        title (`str`):
            Heading.
        facts (`Sequence[tuple[str, str]]`):
            What the page begins with.
        rows (`Sequence[Mapping]`):
            Pairs in their order: `id`, `probability`, `action`, `reason`, `prompt`, `chosen`, `rejected`, and
            `signals`, numbers by name.
        plot (`tuple`, *optional*):
            Points of the reliability plot: foretold, seen, pairs.
        notes (`Sequence[str]`):
            What could not be measured, and other remarks.
    """
    body = [f"<h1>{_text(title)}</h1>", "<table>"]
    body += [f"<tr><th>{_text(name)}</th><td>{_text(value)}</td></tr>" for name, value in facts]
    body.append("</table>")
    body += [f'<p class="soft">{_text(note)}</p>' for note in notes]
    if plot is not None and len(plot[0]):
        body.append(_reliability(*plot))
    actions = sorted({str(row["action"]) for row in rows})
    options = "".join(f'<option value="{_text(action)}">{_text(action)}</option>' for action in actions)
    body.append(
        '<div class="bar"><input id="q" type="search" placeholder="search the texts" aria-label="search the texts">'
        f'<select id="a" aria-label="action"><option value="">all actions</option>{options}</select></div>'
    )
    body += [_article(row) for row in rows]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        "script-src 'unsafe-inline'\">"
        f"<title>{_text(title)}</title><style>{STYLE}</style></head><body>{''.join(body)}"
        f"<script>{SCRIPT}</script></body></html>"
    )
    with replacing(path) as temporary:
        # Half of a surrogate pair, which JSON can hold, is no character of a file.
        temporary.write_text(page, encoding="utf-8", errors="replace")


def _text(value: Any) -> str:
    return html.escape(str(value), quote=True)


def _article(row: Mapping[str, Any]) -> str:
    signals = "".join(f"<tr><td>{_text(name)}</td><td>{value:.3g}</td></tr>" for name, value in row["signals"].items())
    chance = float(row["probability"])
    shown = f"{chance:.2f} wrong" if np.isfinite(chance) else "not judged"
    sides = "".join(
        f'<div><span class="soft">{name}</span><pre>{_text(row[name])}</pre></div>' for name in ("chosen", "rejected")
    )
    action = _text(row["action"])
    return (
        f'<article data-action="{action}"><header><span class="tag {action}">{action}</span>'
        f'<span>{shown}</span><span class="soft">pair {_text(row["id"])}</span><span>{_text(row["reason"])}</span>'
        f'</header><pre class="soft">{_text(row["prompt"])}</pre><div class="pair">{sides}</div>'
        f"<details><summary>signals</summary><table>{signals}</table></details></article>"
    )


def _reliability(foretold: np.ndarray, seen: np.ndarray, sizes: np.ndarray) -> str:
    """What was foretold of held-out labels against what came, from one half to 1."""

    def place(x: float, y: float) -> tuple[float, float]:
        return 40 + 400 * (min(max(x, 0.4), 1.0) - 0.4), 260 - 400 * (min(max(y, 0.4), 1.0) - 0.4)

    (x0, y0), (x1, y1) = place(0.4, 0.4), place(1.0, 1.0)
    dots = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="var(--review)"><title>foretold {a:.2f}, seen {b:.2f}, '
        f"{int(n)} pairs</title></circle>"
        for a, b, n in zip(foretold.tolist(), seen.tolist(), sizes.tolist(), strict=True)
        for x, y in [place(a, b)]
    )
    marks = "".join(
        f'<text x="{place(v, 0.4)[0]:.0f}" y="276" font-size="11" fill="var(--soft)" text-anchor="middle">{v}</text>'
        f'<text x="34" y="{place(0.4, v)[1] + 4:.0f}" font-size="11" fill="var(--soft)" text-anchor="end">{v}</text>'
        for v in (0.4, 0.6, 0.8, 1.0)
    )
    return (
        '<figure><svg viewBox="0 0 300 300" width="300" role="img" aria-label="reliability plot">'
        f'<line x1="{x0}" y1="{y0}" x2="{x1}" y2="{y1}" stroke="var(--line)"/>{marks}{dots}'
        '<text x="160" y="294" font-size="11" fill="var(--soft)" text-anchor="middle">foretold agreement with '
        'held-out labels</text></svg><figcaption class="soft">Up: how many of the labels did agree.</figcaption>'
        "</figure>"
    )
