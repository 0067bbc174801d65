"""The methods in the words of a survey of data selection (hf.co/papers/2406.14115): features, criterion, selector."""

import dataclasses
import inspect
import re
from typing import Any

from .method import HOOKS, Method
from .registry import (
    get_method,
    list_methods,
)

FAMILIES = ("indicator", "reduction", "raw", "none")
"""
What a text is turned into: numbers designed by people (`indicator`: lengths, losses, scores), the model's own
representation (`reduction`: embeddings, gradients, clusters), nothing (`raw`), or it is not looked at (`none`).
"""

CRITERIA = ("internal", "external_discrete", "external_continuous", "none")
"""
Where the judgement of quality comes from: the example and the model in training (`internal`), another model's or
person's grade (`external_discrete`) or number (`external_continuous`), or nowhere (`none`).
"""

COLUMNS = ("name", "family", "criterion", "selector", "cost")


def vocabulary(value: str) -> tuple[str, ...]:
    """The words of an entry: a method may combine some by `and`, or leave the choice by `or`."""
    return tuple(re.split(r" (?:and|or) ", value))


def survey_rows() -> list[dict[str, Any]]:
    """
    One row per registered method, with the keys of `COLUMNS`.

    Raises:
        `ValueError`: if a method declares a family or criterion that is none of the survey's.
    """
    rows = []
    for name in list_methods():
        cls = get_method(name)
        for key, value, known in (("family", cls.family, FAMILIES), ("criterion", cls.criterion, CRITERIA)):
            strange = [word for word in vocabulary(value) if word not in known]
            if strange:
                raise ValueError(f"{name!r} declares {key}={value!r}, but {strange[0]!r} is none of {list(known)}.")
        rows.append({key: name if key == "name" else getattr(cls, key) for key in COLUMNS})
    return rows


def survey_table() -> str:
    """The rows as aligned text, under a line of column names; what `dsel methods --survey` prints."""
    table = [dict(zip(COLUMNS, COLUMNS, strict=True)), *survey_rows()]
    widths = {key: max(len(row[key]) for row in table) for key in COLUMNS[:-1]}
    return "\n".join(
        "  ".join([*(row[key].ljust(width) for key, width in widths.items()), row[COLUMNS[-1]]]) for row in table
    )


def get_method_card(name: str) -> str:
    """The printable card of a method: its docstring, what it needs and does, and its parameters."""
    cls = get_method(name)
    hooks = [hook for hook in HOOKS if getattr(cls, hook) is not getattr(Method, hook)]
    lines = [name, "=" * len(name), "", inspect.cleandoc(cls.__doc__ or ""), ""]
    facts = {
        "paper": cls.paper or "none",
        "trainers": ", ".join(cls.trainers),
        "signals": ", ".join(cls.signals) or "none",
        "hooks": ", ".join(hooks) or "none",
        "cost": cls.cost,
        "state": cls.state,
    }
    lines += [f"{key + ':':<10} {value}" for key, value in facts.items()]
    lines += ["", "parameters:"]
    for f in dataclasses.fields(cls):  # type: ignore[arg-type]
        if f.init:
            default = "required" if f.default is dataclasses.MISSING else f"default {f.default!r}"
            lines.append(f"  {f.name} ({default}): {f.metadata.get('help', '')}")
    return "\n".join(lines)
