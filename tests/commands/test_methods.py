"""`dsel methods`: what it prints is what the cards say."""

import json

import pytest

from dsel_trl import get_method_card, list_methods
from dsel_trl.cli import main
from dsel_trl.commands.methods import describe_methods
from dsel_trl.core.cards import TABLE_BEGIN, TABLE_END, methods_table


def test_the_list():
    lines = describe_methods([]).splitlines()
    assert [line.split()[0] for line in lines] == list_methods()
    for line in lines:
        card = get_method_card(line.split()[0])
        assert line.split()[1:3] == [",".join(card.trainers), ",".join(card.hooks) or "-"]
        assert line.endswith(f"  {card.summary}")


def test_one_card():
    assert describe_methods(["margin"]) == str(get_method_card("margin"))


def test_json():
    assert json.loads(describe_methods(["--json"])) == [get_method_card(name).as_dict() for name in list_methods()]
    assert json.loads(describe_methods(["margin", "--json"])) == [get_method_card("margin").as_dict()]


def test_the_survey(capsys):
    assert main(["methods", "--survey"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["name", "family", "criterion", "selector", "cost"]
    assert len(lines) == len(list_methods()) + 1


def test_markdown(tmp_path):
    assert describe_methods(["--markdown"]) == methods_table()
    file = tmp_path / "page.md"
    file.write_text(f"before\n\n{TABLE_BEGIN}\nold\n{TABLE_END}\n\nafter\n")
    assert "made anew" in describe_methods(["--markdown", str(file)])
    expected = f"before\n\n{TABLE_BEGIN}\n\n{methods_table()}\n\n{TABLE_END}\n\nafter\n"
    assert file.read_text() == expected
    assert "up to date" in describe_methods(["--markdown", str(file)])
    assert file.read_text() == expected


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--survey", "margin"], "leave out 'margin'"),
        (["margin", "--markdown"], "leave out 'margin'"),
        (["--markdown", "nowhere.md"], "nowhere.md"),
        (["--json", "--survey"], "not allowed with"),
        (["margin", "random"], "'random'"),
    ],
)
def test_mistakes(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    assert main(["methods", *words]) == 2
    assert said in capsys.readouterr().err
