"""The card: one record per method, and everything that describes a method says what the card says."""

import dataclasses
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import dsel_trl
from dsel_trl import Method, MethodCard, Signal, get_method, get_method_card, list_methods
from dsel_trl.bases import ExplicitMargin
from dsel_trl.core import cards
from dsel_trl.core.cards import CRITERIA, FAMILIES, card_of, put_methods_table, survey_rows, vocabulary
from dsel_trl.core.charges import Charge

ROOT = Path(__file__).parents[2]
PACKAGE = Path(dsel_trl.__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RECIPES = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
BUILT_IN = [name for name in list_methods() if get_method(name).__module__.startswith("dsel_trl.")]


@dataclass
class Foreign(Method):
    """
    Does what another package wants.

    When not: here.
    """

    column: str = field(metadata={"help": "has to be given"})
    share: float | None = field(default=None, metadata={"help": "a share | or none"})
    words: Sequence[str] = field(default_factory=lambda: ("a", "b"))
    _inner: int = field(default=0, init=False)

    name = "foreign"
    signals = (Signal.LOSS,)
    trainers = ("kto",)
    paper = "hf.co/papers/1234.56789"
    criterion = "internal and external_discrete"

    def weigh(self, batch):
        return None

    def observe(self, run, step):
        return None


# ---- The record ----


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_card_says_what_its_class_declares(name):
    card, cls = get_method_card(name), get_method(name)
    assert isinstance(card, MethodCard)
    assert get_method_card(name) is card
    for entry in ("name", "paper", "trainers", "signals", "cost", "state", "family", "criterion", "selector"):
        assert getattr(card, entry) == getattr(cls, entry)
    assert (PACKAGE / "methods" / card.group / f"{name}.py").exists()
    parameters = {f.name: f for f in dataclasses.fields(cls) if f.init}
    assert [p.name for p in card.parameters] == list(parameters)
    assert [p.default for p in card.parameters] == [f.default for f in parameters.values()]
    assert all(p.help and p.type for p in card.parameters)


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_summary_is_one_sentence(name):
    summary = get_method_card(name).summary
    assert re.fullmatch(r"[A-Z]\w*s [^|]*[^.|]\.", summary), "a verb first, one sentence, its full stop on the line"
    # The line after it is empty, so that the sentence does not go on.
    assert get_method_card(name).text.splitlines()[1:2] == [""]


def test_a_card_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        get_method_card("random").cost = "nothing"


def test_a_method_of_another_package(monkeypatch):
    monkeypatch.setattr(Foreign, "__module__", "their_package.selection.foreign")
    card = card_of(Foreign)
    assert (card.group, card.module) == ("their_package", "their_package.selection.foreign")
    assert (card.summary, card.text) == (
        "Does what another package wants.",
        "Does what another package wants.\n\nWhen not: here.",
    )
    assert card.hooks == ("weigh", "observe")
    assert card.acts_by == ("weigh",)
    assert [(p.name, p.type, p.required) for p in card.parameters] == [
        ("column", "str", True),
        ("share", "float | None", False),
        ("words", "Sequence[str]", False),
    ]
    assert card.parameters[2].default == ("a", "b")
    monkeypatch.setattr(cards, "list_cards", lambda: [get_method_card("random"), card])
    assert "foreign" not in cards.methods_table()
    assert [row["name"] for row in survey_rows()] == ["random", "foreign"]


def test_a_card_as_text_and_as_json():
    card = card_of(Foreign)
    text = str(card)
    assert text.startswith("foreign\n=======\n\nDoes what another package wants.\n\nWhen not: here.\n")
    assert "signals:   loss\n" in text
    assert "hooks:     weigh, observe\n" in text
    assert "  column (str, required): has to be given\n" in text
    assert "  share (float | None, default None): a share | or none" in text
    entries = json.loads(json.dumps(card.as_dict()))
    assert entries == card.as_dict()
    assert set(entries) == {f.name for f in dataclasses.fields(MethodCard)}
    assert entries["parameters"] == [
        {"name": "column", "type": "str", "help": "has to be given"},
        {"name": "share", "type": "float | None", "default": None, "help": "a share | or none"},
        {"name": "words", "type": "Sequence[str]", "default": ["a", "b"], "help": ""},
    ]


@pytest.mark.parametrize(
    ("name", "cost"),
    [
        ("random", "no extra forward"),
        ("jest", "factor candidates per trained example; 1 forward with reference per candidate"),
        ("ifd", "2 forwards per example and measurement"),
        ("margin", "no extra forward"),
        # Neither a model nor clean rows are named by default, and one of them must be.
        ("rho1", "1 scorer forward with reference per example (model)"),
    ],
)
def test_the_cost_by_default_is_the_part_that_applies_to_the_defaults(name, cost):
    card = get_method_card(name)
    assert card.cost_by_default == cost
    assert len(card.cost_by_default) <= len(card.cost)


def test_a_parameter_that_has_to_be_given_counts_as_set():
    charged = type(
        "Charged",
        (Foreign,),
        {"name": "charged", "charges": (Charge("forwards", when="column"), Charge("rewards", when="share"))},
    )
    assert card_of(charged).cost == "1 forward per example (column); 1 reward per example (share)"
    assert card_of(charged).cost_by_default == "1 forward per example"


# ---- The survey ----


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


def test_one_formula_has_one_place_in_the_survey():
    """The excess over a second model's loss is one criterion; a score or reward is a preference."""
    assert {get_method_card(name).criterion for name in ("rho_loss", "jest", "rho1")} == {"external_continuous"}
    for name in list_methods():
        if issubclass(get_method(name), ExplicitMargin) and get_method(name).explicit is ExplicitMargin.explicit:
            assert "external_discrete" in vocabulary(get_method_card(name).criterion), name


@pytest.mark.parametrize(("key", "value"), [("family", "lengths"), ("criterion", "internal or lengths")])
def test_a_strange_word_is_named(key, value):
    strange = type("Strange", (Foreign,), {key: value, "name": "strange"})
    with pytest.raises(ValueError, match=f"'strange' declares {key}='{value}', but 'lengths' is none of"):
        card_of(strange)


# ---- The README, and that of the recipes ----


def test_both_tables_show_the_cards():
    assert put_methods_table(README) == README, "the cards have changed: `dsel methods --markdown README.md`"
    assert put_methods_table(RECIPES) == RECIPES, "the cards have changed: `dsel methods --markdown recipes/README.md`"


def test_each_method_is_in_the_line_of_its_family():
    table = README.partition(cards.FAMILIES_BEGIN)[2].partition(cards.FAMILIES_END)[0]
    found = {}
    for line in table.splitlines()[4:]:
        if line.startswith("| ["):
            family = re.match(r"\| \[(\w+)\]\(recipes/README\.md#\1\)", line)[1]
            found.update(dict.fromkeys(re.findall(r"\[`(\w+)`\]\(recipes/\1\.yaml\)", line), family))
    assert found == {name: get_method_card(name).group for name in BUILT_IN}


def test_each_method_is_in_the_table_with_its_recipe():
    table = RECIPES.partition(cards.TABLE_BEGIN)[2].partition(cards.TABLE_END)[0]
    assert sorted(re.findall(r"^\| \[`(\w+)`\]\(\1\.yaml\) \|", table, re.MULTILINE)) == BUILT_IN
    groups = {name: get_method_card(name).group for name in BUILT_IN}
    for section in table.split("### ")[1:]:
        here = set(re.findall(r"^\| \[`(\w+)`\]", section, re.MULTILINE))
        assert here == {name for name, group in groups.items() if group == section.split()[0]}
    # As many cells in each row as in the head, and no address that is not a link.
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {len(cards.TABLE_COLUMNS) + 1}
    assert not re.search(r"(?<!https://)(hf\.co|github\.com)/", table)


def test_the_readme_links_all_recipes_that_there_are():
    linked = set(re.findall(r"\]\(recipes/([\w/]+\.yaml)\)", README))
    assert linked == {path.name for path in (ROOT / "recipes").glob("*.yaml")}


@pytest.mark.parametrize(
    ("paper", "expected"),
    [
        ("", ""),
        ("hf.co/papers/1234.56789", "[1234.56789](https://hf.co/papers/1234.56789)"),
        ("hf.co/papers/1.2, hf.co/papers/3.4", "[1.2](https://hf.co/papers/1.2), [3.4](https://hf.co/papers/3.4)"),
        ("github.com/some.one/a-code (ACL 2025)", "[a-code](https://github.com/some.one/a-code) (ACL 2025)"),
        ("a book", "a book"),
    ],
)
def test_papers_are_links(paper, expected):
    assert cards._linked(paper) == expected


def test_a_bar_does_not_end_a_cell(monkeypatch):
    strange = dataclasses.replace(get_method_card("random"), summary="Keeps a | b.", paper="")
    monkeypatch.setattr(cards, "list_cards", lambda: [strange])
    row = cards.methods_table().splitlines()[-1]
    assert row.startswith(r"| [`random`](random.yaml) | Keeps a \| b. | dpo, sft, kto, reward | `select` |")


@pytest.mark.parametrize(
    "text",
    [
        "no markers",
        cards.TABLE_BEGIN,
        f"{cards.TABLE_END} {cards.TABLE_BEGIN}",
        f"{cards.TABLE_BEGIN} {cards.TABLE_END} {cards.TABLE_BEGIN}",
        f"{cards.TABLE_BEGIN} {cards.TABLE_BEGIN} {cards.TABLE_END}",
        f"{cards.FAMILIES_BEGIN} {cards.TABLE_END}",
    ],
)
def test_a_document_without_its_markers(text):
    with pytest.raises(ValueError, match="each of them once"):
        put_methods_table(text)
