"""The card of a method: one record, read by whatever lists, prints or describes methods."""

import dataclasses
import inspect
import json
import re
import sys
from dataclasses import dataclass
from functools import cache
from typing import Any

from ..signals.batch import Signal
from .charges import described
from .method import HOOKS, Method
from .registry import get_method, list_methods

FAMILIES = ("indicator", "reduction", "raw", "none")
"""
What a text is turned into: numbers designed by people (`indicator`: lengths, losses, scores), the model's own
representation (`reduction`: embeddings, gradients, clusters), nothing (`raw`), or it is not looked at (`none`).
"""

CRITERIA = ("internal", "external_discrete", "external_continuous", "none")
"""
Where the judgement of quality comes from: the example and the model in training (`internal`), what another model or a
person prefers, as a grade, a score or a reward (`external_discrete`), what an example does to a model's output,
measured with a second model or on other data (`external_continuous`), or nowhere (`none`).
"""

SURVEY_COLUMNS = ("name", "family", "criterion", "selector", "cost")
WATCHING = ("setup", "score", "observe")
"""Hooks that measure or prepare; by the others a method acts on the run."""

BUILT_IN = "dsel_trl.methods."
TABLE_BEGIN, TABLE_END = "<!-- methods: begin -->", "<!-- methods: end -->"
FAMILIES_BEGIN, FAMILIES_END = "<!-- families: begin -->", "<!-- families: end -->"
TABLE_COLUMNS = ("method", "what it does", "trainers", "acts by", "cost by default", "paper")


@dataclass(frozen=True)
class Parameter:
    """
    A parameter of a method.

    Args:
        name (`str`): its name in Python and YAML.
        type (`str`): its type, as in the code.
        default (`Any`): its default; `dataclasses.MISSING` where it has to be given.
        help (`str`): what it does.
    """

    name: str
    type: str
    default: Any
    help: str

    @property
    def required(self) -> bool:
        return self.default is dataclasses.MISSING

    def __str__(self) -> str:
        default = "required" if self.required else f"default {self.default!r}"
        return f"{self.name} ({self.type}, {default}): {self.help}"


@dataclass(frozen=True)
class MethodCard:
    """
    What there is to say about a method; `str(card)` is the card to read.

    Args:
        name (`str`): the name it is registered under.
        group (`str`): the folder of `dsel_trl/methods` it lives in (`"preference"`, `"text"`, ...); of a method of
            another package, the name of that package.
        module (`str`): the module that defines it.
        summary (`str`): what it does, in one line: the first of its docstring.
        text (`str`): its whole docstring.
        paper (`str`): where it comes from; empty if from nowhere.
        trainers (`tuple[str, ...]`): which trainers it supports.
        signals (`tuple[Signal, ...]`): what it measures.
        hooks (`tuple[str, ...]`): the hooks its class overrides; parameters may switch some of them off.
        cost (`str`): what it costs beside the training.
        cost_by_default (`str`): the part of it that falls to the defaults of its parameters.
        state (`str`): what it keeps.
        family, criterion, selector (`str`): its place in a survey of data selection (hf.co/papers/2406.14115).
        parameters (`tuple[Parameter, ...]`): what can be set.
    """

    name: str
    group: str
    module: str
    summary: str
    text: str
    paper: str
    trainers: tuple[str, ...]
    signals: tuple[Signal, ...]
    hooks: tuple[str, ...]
    cost: str
    cost_by_default: str
    state: str
    family: str
    criterion: str
    selector: str
    parameters: tuple[Parameter, ...]

    def __str__(self) -> str:
        facts = {
            "group": self.group,
            "paper": self.paper or "none",
            "trainers": ", ".join(self.trainers),
            "signals": ", ".join(self.signals) or "none",
            "hooks": ", ".join(self.hooks) or "none",
            "cost": self.cost,
            "state": self.state,
        }
        lines = [self.name, "=" * len(self.name), "", self.text, ""]
        lines += [f"{key + ':':<10} {value}" for key, value in facts.items()]
        lines += ["", "parameters:", *(f"  {parameter}" for parameter in self.parameters)]
        return "\n".join(lines)

    @property
    def acts_by(self) -> tuple[str, ...]:
        """The hooks by which it changes what is trained; none = it only watches."""
        return tuple(hook for hook in self.hooks if hook not in WATCHING)

    def as_dict(self) -> dict[str, Any]:
        """All entries as JSON can hold them; a parameter that has to be given has no `default`."""
        entries = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        entries["parameters"] = [
            {key: value for key, value in vars(parameter).items() if value is not dataclasses.MISSING}
            for parameter in self.parameters
        ]
        # A default that JSON does not know is shown as Python writes it.
        return json.loads(json.dumps(entries, default=repr))


@cache
def card_of(cls: type[Method]) -> MethodCard:
    """
    The card of a registered class, made once.

    Raises:
        `ValueError`: if the class declares a family or criterion that is none of the survey's.
    """
    for key, value, known in (("family", cls.family, FAMILIES), ("criterion", cls.criterion, CRITERIA)):
        strange = [word for word in vocabulary(value) if word not in known]
        if strange:
            raise ValueError(f"{cls.name!r} declares {key}={value!r}, but {strange[0]!r} is none of {list(known)}.")
    text = inspect.cleandoc(cls.__doc__ or "")
    rooms = cls.__module__.removeprefix(BUILT_IN).split(".")
    return MethodCard(
        name=cls.name,
        group=rooms[0],
        module=cls.__module__,
        summary=text.partition("\n")[0],
        text=text,
        paper=cls.paper,
        trainers=tuple(cls.trainers),
        signals=tuple(cls.signals),
        hooks=tuple(hook for hook in HOOKS if getattr(cls, hook) is not getattr(Method, hook)),
        cost=cls.cost,
        cost_by_default=_cost_by_default(cls),
        state=cls.state,
        family=cls.family,
        criterion=cls.criterion,
        selector=cls.selector,
        parameters=tuple(
            Parameter(f.name, _type_name(f.type), _default(f), f.metadata.get("help", ""))
            for f in dataclasses.fields(cls)  # type: ignore[arg-type]
            if f.init
        ),
    )


def _cost_by_default(cls: type[Method]) -> str:
    # No object by its constructor: that may refuse the defaults, of which some method wants one to be set.
    method = object.__new__(cls)
    for f in dataclasses.fields(cls):  # type: ignore[arg-type]
        if f.init:
            default = _default(f)
            # What has to be given is set.
            setattr(method, f.name, True if default is dataclasses.MISSING else default)
    words = cls.cost.removesuffix(described(cls.charges)).removesuffix("; ")
    figures = [charge.figure for charge in cls.charges if charge.applies(method)]
    if not words and not figures:
        # The defaults alone do not run: the first way is what one pays for.
        figures = [str(cls.charges[0])]
    return "; ".join(filter(None, [words, *figures]))


def vocabulary(value: str) -> tuple[str, ...]:
    """The words of an entry: a method may combine some by `and`, or leave the choice by `or`."""
    return tuple(re.split(r" (?:and|or) ", value))


def _type_name(annotation: Any) -> str:
    # A module with `from __future__ import annotations` has its types as text already.
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return text.replace("collections.abc.", "").replace("typing.", "")


def _default(entry: dataclasses.Field) -> Any:
    return entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()


def get_method_card(name: str) -> MethodCard:
    """
    The card of the method `name`.

    Example:

    ```python
    >>> card = get_method_card("random")
    >>> card.summary
    'Keeps a random fraction of the examples.'
    >>> print(card)  # all of it, to read
    ```

    Raises:
        `ValueError`: if there is no such method (with close matches).
    """
    return card_of(get_method(name))  # type: ignore[arg-type]  # a class is hashable, whatever its objects are


def list_cards() -> list[MethodCard]:
    """The cards of all registered methods, by name."""
    return [get_method_card(name) for name in list_methods()]


def survey_rows() -> list[dict[str, str]]:
    """One row per registered method, with the keys of `SURVEY_COLUMNS`."""
    return [{key: getattr(card, key) for key in SURVEY_COLUMNS} for card in list_cards()]


def survey_table() -> str:
    """The rows as aligned text, under a line of column names; what `dsel methods --survey` prints."""
    return aligned([SURVEY_COLUMNS, *(tuple(row.values()) for row in survey_rows())])


def aligned(rows: list[tuple[str, ...]]) -> str:
    """Rows as text with columns of equal width; the last one is as long as it is."""
    widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:-1]]
    return "\n".join("  ".join([*map(str.ljust, row, widths), row[-1]]) for row in rows)


def _groups() -> dict[str, list[MethodCard]]:
    """The cards of the built-in methods by group."""
    groups: dict[str, list[MethodCard]] = {}
    for card in list_cards():
        if card.module.startswith(BUILT_IN):
            groups.setdefault(card.group, []).append(card)
    # What comparisons need closes the list; readers look for a method first.
    return {name: groups[name] for name in sorted(groups, key=lambda name: (name == "control", name))}


def methods_table() -> str:
    """
    The built-in methods in Markdown, a table per group; what stands between the markers of `recipes/README.md`.

    Links are relative to the folder `recipes/`.
    """
    return "\n\n".join(_group_section(name, cards) for name, cards in _groups().items())


def families_table() -> str:
    """The groups in Markdown, a line for each; what stands between the markers of the README."""
    rows = ["| family | chooses | methods |", "| --- | --- | --- |"]
    for name, cards in _groups().items():
        what = " ".join(str(sys.modules[BUILT_IN + name].__doc__).split()).removesuffix(".")
        methods = ", ".join(f"[`{card.name}`](recipes/{card.name}.yaml)" for card in cards)
        rows.append(f"| [{name}](recipes/README.md#{name}) | {what} | {methods} |")
    return "\n".join(rows)


def _group_section(group: str, cards: list[MethodCard]) -> str:
    rows = [TABLE_COLUMNS, tuple("---" for _ in TABLE_COLUMNS)]
    for card in cards:
        link = f"[`{card.name}`]({card.name}.yaml)"
        acts = ", ".join(f"`{hook}`" for hook in card.acts_by) or "-"
        paper = _linked(card.paper) or "-"
        rows.append((link, card.summary, ", ".join(card.trainers), acts, card.cost_by_default, paper))
    table = "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows)
    return f"### {group}\n\n{sys.modules[BUILT_IN + group].__doc__}\n\n{table}"


def _linked(paper: str) -> str:
    """Addresses as links that show their last part: the paper's number, the repository's name."""
    return re.sub(r"(?:hf\.co/papers|github\.com/[\w.-]+)/([\w.-]*\w)", r"[\1](https://\g<0>)", paper)


def put_methods_table(text: str) -> str:
    """
    A document with the table of methods, or that of families, made anew between its markers.

    Raises:
        `ValueError`: unless the two markers of one of them are there once, in order.
    """
    forms = {(TABLE_BEGIN, TABLE_END): methods_table, (FAMILIES_BEGIN, FAMILIES_END): families_table}
    for (begin, end), table in forms.items():
        parts = re.split(f"({begin}|{end})", text)
        if parts[1::2] == [begin, end]:
            return f"{parts[0]}{begin}\n\n{table()}\n\n{end}{parts[4]}"
    raise ValueError(
        f"The table of methods stands between {TABLE_BEGIN!r} and {TABLE_END!r}, that of families between "
        f"{FAMILIES_BEGIN!r} and {FAMILIES_END!r}, each of them once."
    )
