"""The page of a run: one file, text that stays text, and what it says is what the ledger holds."""

import json
import re
from html import unescape

import numpy as np
import pytest

from dsel_trl.core.ledger import Ledger
from dsel_trl.report import charts
from dsel_trl.report.html import page
from dsel_trl.report.record import RunRecord
from tests import browser

EVIL = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)> <!-- & \u2028 \"'"
SUMMARY = {
    "methods": [{"name": "margin", "keep": 0.5}],
    "trainer": "DPOTrainer",
    "steps": 6,
    "notes": [EVIL],
    "cost": {"forwards": 12, "forward_tokens": 340, "seconds": 0.5},
}
HISTORY = [
    {"step": float(s), "kept_fraction": 0.5, "margin_q10": -s, "margin_q50": 0.0, "margin_q90": s, "length_q10": 3.0,
     "length_q50": 4.0, "length_q90": 9.0, "effective_sample_size": 4.0, "weighted_loss": 1 / s}
    for s in (1, 2, 3)
]  # fmt: skip


def record(name="run", size=40):
    ledger = Ledger(size)
    scores = np.arange(size, dtype=np.float32)
    ledger.decide("margin", None, scores, 2, "scores from 20 up are kept (keep_top)")
    ledger.drop(scores < 20, "margin")
    ledger.visit(np.arange(20, 30))
    ledger.write("weight", np.arange(20, 30), np.linspace(0.5, 1.5, 10), step=3)
    found = RunRecord.of(ledger, SUMMARY, HISTORY)
    found.name = name
    return found


def stream(**values):
    names = [EVIL, "second"]
    return {
        "methods": [{"name": "adapt_inf"}],
        "replay": "all",
        "seed": 3,
        "stages": [{"name": n, "pool": 10, "steps": 4, "tokens": 1234, "dropped_for_good": 2} for n in names],
        "loss": {"table": [[1.5, None], [2.25, 0.5]], "final_mean": 1.375, "forgetting": 0.75},
        **values,
    }


def test_the_forgetting_table_is_text():
    text = page([], [], [], streams={EVIL: stream(), "plain": stream(methods=None)})
    assert "<img" not in text
    assert text.count("<script") == 2
    cells = re.findall(r"<td[^>]*>(.*?)</td>", text)
    place = cells.index("second")
    assert [unescape(cell) for cell in cells[place - 3 : place + 3]] == [
        EVIL,
        "1.5000",
        "",
        "second",
        "2.2500",
        "0.5000",
    ]
    assert "mean at the end 1.3750, forgotten 0.7500" in text
    assert "adapt_inf, replay all, seed 3" in text
    assert "no selection, replay all" in text
    assert "1,234" in cells


def example(**values):
    return {
        "run": 0, "id": 3, "kind": "dropped", "score": 3.0, "by": "margin", "step": 2, "weight": float("nan"),
        "visits": 0, "reason": "margin: scores from 20 up are kept", "texts": [["prompt", EVIL]], **values,
    }  # fmt: skip


def test_a_page_needs_nothing_else_and_holds_no_markup_of_the_data():
    columns = {"source": np.array([EVIL, "b"] * 20)}
    text = page([record(EVIL)] * 2, [example(), example(score=float("-inf"))], [columns, columns], [EVIL])
    assert not re.search(r"""(src|href)=["']?(https?:|//|\w)|url\(|@import""", text.replace("src=x", ""))
    assert "<img" not in text
    assert text.count("<script") == text.count("</script>") == 2
    assert "default-src 'none'" in text
    data = json.loads(re.search(r"id='data'>(.*?)</script>", text, re.DOTALL)[1])
    assert data["examples"][0]["texts"] == [["prompt", EVIL]]
    assert [e["score"] for e in data["examples"]] == [3.0, "-inf"]
    assert [e["weight"] for e in data["examples"]] == [None, None]
    assert EVIL.split("<!--")[0].strip() in unescape(text)


def test_a_page_says_why_with_numbers():
    text = unescape(page([record()], [], [{}]))
    assert "kept (20)" in text
    assert "dropped (20)" in text
    row = re.search(r"<tr><td>margin: scores from 20 up are kept \(keep_top\)</td>(.*?)</tr>", text)[1]
    assert re.findall(r"<td>(.*?)</td>", row) == ["20", "0 to 19", "2"]
    assert "<td>forwards</td><td>12</td><td>340</td>" in text
    assert "Examples" not in text


def test_a_run_of_which_nothing_is_known_has_a_page():
    text = page([RunRecord.of(Ledger(3), {**SUMMARY, "notes": [], "cost": {}}, [])], [], [{}])
    assert "nothing was left out" in text
    assert "no model was asked for it" in text


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (-0.03, 0.04, [-0.02, 0.0, 0.02, 0.04]),
        (5, 5, [5]),
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
    ],
)
def test_ticks_are_round(low, high, expected):
    assert charts.ticks(low, high) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("value", "text"),
    [(float("nan"), "–"), (0.0, "0"), (1.23456, "1.235"), (-12345.6, "-12,346"), (3e-7, "3e-7"), (2.5e9, "2.5e9")],
)
def test_numbers_are_short(value, text):
    assert charts.number(value) == text


def test_shares_of_a_step_add_up_and_bars_hold_every_value():
    drawn = charts.shares(np.array([0, 1, 2]), {"a": np.array([3, 0]), "b": np.array([1, 5])}, "mix")
    heights = [float(found) for found in re.findall(r'height="([\d.]+)"', drawn)]
    assert sum(heights[:1]) / (charts.HEIGHT - charts.TOP - charts.BOTTOM) == pytest.approx(0.75, abs=1e-3)
    assert re.findall(r"<title>(.*?)</title>", drawn) == ["a: 75.0%", "b: 25.0%", "b: 100.0%"]
    bars = charts.histogram({"x": np.r_[np.nan, np.inf, np.arange(100.0)]}, "x", "x")
    assert sum(int(n) for n in re.findall(r"<title>x: (\d+) from", bars)) == 100


# ---- In a browser ----

PROBE = """
const style = getComputedStyle(document.body), wide = document.documentElement.scrollWidth;
const search = document.getElementById("search");
const count = () => document.getElementById("count").textContent;
const cards = () => [...document.querySelectorAll(".example")];
const all = count();
search.value = "needle"; search.dispatchEvent(new Event("input"));
const found = [count(), cards().length, cards()[0].textContent];
search.value = ""; search.dispatchEvent(new Event("input"));
const kind = document.getElementById("kind"); kind.value = "largest weight"; kind.dispatchEvent(new Event("change"));
result = {wide, paper: style.backgroundColor, all, found, heavy: count(), title: document.title,
  evil: document.querySelectorAll("img").length,
  columns: getComputedStyle(document.querySelector(".cards")).gridTemplateColumns,
  letters: Math.min(...[...document.querySelectorAll("svg text")].map(t => t.getBoundingClientRect().height))};
"""


@pytest.mark.parametrize(("width", "dark"), [(1300, False), (390, False), (1300, True)])
def test_in_a_browser(tmp_path, width, dark):
    examples = [example(id=i) for i in range(30)]
    examples += [example(id=99, texts=[["prompt", "a needle here"]]), example(kind="largest weight", weight=2.5)]
    file = tmp_path / "report.html"
    file.write_text(page([record()], examples, [{"source": np.array(["a", "b"] * 20)}]), encoding="utf-8")
    shown = browser.document(file, PROBE, width, dark)
    found = json.loads(unescape(re.search(r'<pre id="out">(.*?)</pre>', shown, re.DOTALL)[1]))
    assert found["wide"] <= width, "the page scrolls sideways"
    assert found["evil"] == 0
    assert found["title"] == "margin"
    assert found["all"] == "32 examples"
    assert found["found"][:2] == ["1 example", 1]
    assert "a needle here" in found["found"][2]
    assert "this one has 3" in found["found"][2]
    assert found["heavy"] == "1 example"
    assert len(found["columns"].split()) == (1 if width < 800 else 2)
    assert found["letters"] > 9
    red = int(re.match(r"rgb\((\d+)", found["paper"])[1])
    assert red < 60 if dark else red > 200
