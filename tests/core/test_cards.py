"""Every registered method places itself in the survey's vocabulary."""

import pytest

from dsel_trl import get_method, list_methods
from dsel_trl.cli import main
from dsel_trl.core.cards import CRITERIA, FAMILIES, survey_rows, vocabulary


def test_each_method_has_its_row():
    rows = {row["name"]: row for row in survey_rows()}
    assert list(rows) == list_methods()
    for name, row in rows.items():
        assert set(vocabulary(row["family"])) <= set(FAMILIES), name
        assert set(vocabulary(row["criterion"])) <= set(CRITERIA), name
        assert row["selector"], name
    assert rows["semdedup"]["family"] == "reduction"
    assert rows["zip"]["family"] == "raw"
    assert rows["deita"]["criterion"] == "external_discrete"
    assert rows["random"]["criterion"] == "none"


def test_a_strange_word_is_named(monkeypatch):
    monkeypatch.setattr(get_method("random"), "family", "lengths")
    with pytest.raises(ValueError, match="'random' declares family='lengths'"):
        survey_rows()


def test_the_command_prints_the_table(capsys):
    assert main(["methods", "--survey"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["name", "family", "criterion", "selector", "cost"]
    assert len(lines) == len(list_methods()) + 1
