"""Checks of parameters: each slip names the parameter, its value and what would be right."""

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


def nearest(word: str, known: Iterable[str]) -> str:
    """` Did you mean ...?` with the closest of the known words, or nothing."""
    close = difflib.get_close_matches(str(word), list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Raises `ValueError` naming the parameter, its value and what would be right."""
    if value not in choices:
        close = nearest(value, [c for c in choices if isinstance(c, str)]) if isinstance(value, str) else ""
        raise ValueError(f"{name}={value!r} is none of {list(choices)}.{close}")


def check_range(
    name: str, value: Any, low: float, high: float, *, open_low: bool = False, open_high: bool = False
) -> None:
    """Raises `ValueError`, naming parameter, value and interval, if `value` is not a number in the interval."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    inside = number and low <= value <= high and not (open_low and value == low) and not (open_high and value == high)
    if not inside:
        interval = f"{'(' if open_low else '['}{low}, {high}{')' if open_high else ']'}"
        raise ValueError(f"{name}={value!r} is not a number in {interval}.")


def check_whole(name: str, value: Any, low: int, high: int = 2**31) -> None:
    """Raises `ValueError`, naming parameter, value and interval, if `value` is not a whole number in the interval."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name}={value!r} is not a whole number in [{low}, {high}].")


REFRESHES = ("never", "epoch", "steps")


def check_refresh(value: Any, allowed: Sequence[str] = ("epoch", "steps")) -> None:
    """
    Raises `ValueError` unless `value` says when a plan or score is made anew: `"never"`, `"epoch"`, or a positive
    number of optimizer steps, as far as `allowed` has them (`"steps"` stands for the number).
    """
    steps = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if ("steps" in allowed) if steps else (isinstance(value, str) and value != "steps" and value in allowed):
        return
    right = " or ".join("a positive number of optimizer steps" if word == "steps" else repr(word) for word in allowed)
    raise ValueError(f"refresh={value!r} is not {right}.")


# ---- Parameters that are read under a condition ----


@dataclass(frozen=True)
class When:
    """
    A condition under which a parameter is read: something about the others.

    Attributes:
        text (`str`):
            The condition in words, as an error says it.
        parameters (`tuple[str, ...]`):
            The parameters it looks at.
        holds (`Callable[[Any], bool]`):
            Whether it holds for a method.
        values (`tuple`, *optional*):
            Where it asks for values of its one parameter: these.
    """

    text: str
    parameters: tuple[str, ...]
    holds: Callable[[Any], bool]
    values: tuple[Any, ...] = ()


Reads = Mapping[str, tuple[When, ...]]
"""The conditions, all of them, under which each of these parameters is read; a parameter left out is always read."""


def when(name: str, *values: Any) -> When:
    """Read where the parameter `name` has one of `values`."""
    text = f"{name}={' or '.join(map(repr, values))}"
    return When(text, (name,), lambda method: getattr(method, name) in values, values)


def unless(name: str, *values: Any) -> When:
    """Read where the parameter `name` has none of `values`."""
    text = f"another {name} than {' or '.join(map(repr, values))}"
    return When(text, (name,), lambda method: getattr(method, name) not in values)


def given(name: str) -> When:
    """Read where the parameter `name` is given: neither `None` nor `False` nor 0."""
    return When(f"{name} given", (name,), lambda method: bool(getattr(method, name)))


def without(name: str) -> When:
    """Read where the parameter `name` is left out."""
    return When(f"no {name} given", (name,), lambda method: not getattr(method, name))


def among(name: str, value: Any) -> When:
    """Read where the list in the parameter `name` holds `value`."""
    return When(f"{value!r} among {name}", (name,), lambda method: value in getattr(method, name))


def either(*conditions: When) -> When:
    """Read where one of the conditions holds."""
    names = tuple(dict.fromkeys(name for condition in conditions for name in condition.parameters))
    text = ", or ".join(condition.text for condition in conditions)
    return When(text, names, lambda method: any(condition.holds(method) for condition in conditions))


def never(why: str) -> When:
    """Never read; `why` says what is read instead."""
    return When(why, (), lambda method: False)


def reads_of(cls: type) -> dict[str, tuple[When, ...]]:
    """The `reads` of a class and its bases; what a class says of a parameter replaces what its bases say."""
    return {name: found for base in reversed(cls.__mro__) for name, found in vars(base).get("reads", {}).items()}


def check_reads(cls: Any) -> None:
    """Raises `ValueError` where the `reads` of a class name a parameter that it has not."""
    known = {f.name for f in dataclasses.fields(cls)}
    for name, conditions in reads_of(cls).items():
        for word in (name, *(parameter for condition in conditions for parameter in condition.parameters)):
            if word not in known:
                raise ValueError(f"{cls.__name__}.reads names {word!r}, which is none of its parameters.")


def check_unread(method: Any) -> None:
    """
    Raises `ValueError` if a parameter was set that the others leave unread: it would be ignored.

    The error names the parameter and its value, what leaves it unread, and with what it is read.
    """
    reads = reads_of(type(method))
    for f in dataclasses.fields(method):
        value, failed = getattr(method, f.name), [c for c in reads.get(f.name, ()) if not c.holds(method)]
        if not failed or f.default is dataclasses.MISSING or _same(value, f.default):
            continue
        for condition in failed:
            if not condition.parameters:
                raise ValueError(f"{f.name}={value!r} is not read by {method.name!r}: {condition.text}.")
            if (
                condition.values
                and condition.parameters == ("action",)
                and not {*condition.values} & {*method.actions}
            ):
                raise ValueError(
                    f"{f.name}={value!r} is read with {condition.text} only, but the actions of {method.name!r} are "
                    f"{list(method.actions)}. Leave it out."
                )
        names = dict.fromkeys(name for condition in failed for name in condition.parameters)
        actual = ", ".join(f"{name}={getattr(method, name)!r}" for name in names)
        wanted = " and ".join(condition.text for condition in failed)
        raise ValueError(f"{f.name}={value!r} is not read with {actual}, but with {wanted}. Leave it out.")


def _same(value: Any, default: Any) -> bool:
    if value is default:
        return True
    try:
        return bool(value == default)
    except ValueError:
        # Arrays: a default is none.
        return False
