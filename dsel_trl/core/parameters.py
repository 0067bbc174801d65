"""Checks of parameters: each slip names the parameter, its value and what would be right."""

import difflib
from collections.abc import Iterable, Sequence
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
