"""The page of an audit in a real browser: readable at any width, in light and dark, and searchable."""

import json
import re
from html import unescape

import numpy as np
import pytest

from dsel_trl.report.audit_page import write_audit_page
from tests import browser

EVIL = "</pre><script>document.title='owned'</script><img src=x onerror=alert(1)>"
PROBE = """
const shown = () => [...document.querySelectorAll("article")].filter(e => !e.hidden);
const q = document.getElementById("q"), a = document.getElementById("a"), all = shown().length;
q.value = "needle"; q.oninput();
const found = shown().map(e => e.textContent);
q.value = ""; a.value = "drop"; a.onchange();
const dropped = shown().length;
a.value = ""; a.onchange();
for (const each of document.querySelectorAll("details")) each.open = true;
const boxes = [...document.querySelectorAll("article:first-of-type .pair > div")].map(e => e.getBoundingClientRect());
result = {wide: document.documentElement.scrollWidth, paper: getComputedStyle(document.body).backgroundColor,
  ink: getComputedStyle(document.body).color, all, found, dropped, title: document.title,
  evil: document.querySelectorAll("img").length, beside: boxes[0].top === boxes[1].top,
  dots: document.querySelectorAll("svg circle").length};
"""


def rows():
    signals = {"difference_sum": -12.5, "difference_gain_mean": 0.03, "opinion_a_rather_long_name_of_a_signal": np.nan}
    said = {"prompt": "Say it. " + EVIL, "chosen": "w" * 300, "rejected": "a b c " * 80, "signals": signals}
    found = [
        {**said, "id": i, "probability": 0.9 - i / 50, "action": "flip", "reason": "it is wrong"} for i in range(8)
    ]
    found.append({**found[0], "id": 90, "action": "drop", "reason": "repeats pair 3", "chosen": "a needle here"})
    found.append({**found[0], "id": 91, "action": "review", "probability": np.nan})
    return found


@pytest.mark.parametrize(("width", "dark"), [(1300, False), (390, False), (1300, True)])
def test_in_a_browser(tmp_path, width, dark):
    plot = (np.linspace(0.5, 0.95, 10), np.linspace(0.48, 0.97, 10), np.full(10, 30))
    facts = [("Dataset", "a/" + "long" * 30), ("Suggested", "flip 8, drop 1, review 1, keep 90")]
    write_audit_page(tmp_path / "audit.html", "Audit of preference labels", facts, rows(), plot, [EVIL])
    shown = browser.document(tmp_path / "audit.html", PROBE, width, dark)
    found = json.loads(unescape(re.search(r'<pre id="out">(.*?)</pre>', shown, re.DOTALL)[1]))
    assert found["wide"] <= width, "the page scrolls sideways"
    assert (found["evil"], found["title"]) == (0, "Audit of preference labels")
    assert (found["all"], found["dropped"], found["dots"]) == (10, 1, 10)
    assert len(found["found"]) == 1
    assert "repeats pair 3" in found["found"][0]
    assert found["beside"] == (width > 800)
    paper, ink = (int(re.match(r"rgb\((\d+)", found[name])[1]) for name in ("paper", "ink"))
    assert abs(paper - ink) > 150
    assert paper < 60 if dark else paper > 200
