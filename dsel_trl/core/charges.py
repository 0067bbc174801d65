"""What a method says it costs: figures that its card shows in words and that a test compares with the counter."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

# What is charged, in words: one, and several.
NOUNS = {
    "forwards": ("forward", "forwards"),
    "gradients": ("gradient", "gradients"),
    "scorer_forwards": ("scorer forward", "scorer forwards"),
    "extra_losses": ("extra loss", "extra losses"),
    "helper_forwards": ("helper forward", "helper forwards"),
    "helper_trainings": ("helper training", "helper trainings"),
    "generated_responses": ("generated response", "generated responses"),
    "rewards": ("reward", "rewards"),
}
# A training, a gradient or a loss that is added is a forward and a backward pass; where a reference model is asked
# too, it is that of the same family.
PARTS = {
    "gradients": ("forwards", "backwards"),
    "helper_trainings": ("helper_forwards", "helper_backwards"),
    "extra_losses": ("forwards", "backwards"),
}
REFERENCES = {
    "forwards": "reference_forwards",
    "gradients": "reference_forwards",
    "extra_losses": "reference_forwards",
    "scorer_forwards": "reference_forwards",
    "helper_forwards": "helper_reference_forwards",
    "helper_trainings": "helper_reference_forwards",
}


@dataclass(frozen=True)
class Charge:
    """
    One entry of a method's cost: `amount` of something for each of some unit, under a condition.

    Attributes:
        what (`str`): a name of `NOUNS`.
        amount (`str`, *optional*, defaults to `"1"`): numbers and parameters joined by `*`, `/` and `+`, from left to
            right: `"helpers * evaluations / 2"`.
        per (`str`, *optional*, defaults to `"example"`): the unit, one that the method's `units` knows.
        when (`str`, *optional*): parameters for which it applies, joined by `and` or `or`: `"source: online"` (has
            this value), `"prescore"` (is set), `"no model"` (is not set).
        reference (`bool`, *optional*, defaults to `False`): whether the reference model is asked as often, where the
            trainer has one and its log-probabilities are not precomputed.
        at_most (`bool`, *optional*, defaults to `False`): whether less may be needed, depending on the data.
    """

    what: str
    amount: str = "1"
    per: str = "example"
    when: str = ""
    reference: bool = False
    at_most: bool = False

    @property
    def figure(self) -> str:
        """The entry in words, without its condition."""
        one, several = NOUNS[self.what]
        words = [self.amount, one if self.amount == "1" else several]
        words = ["at most", *words] if self.at_most else words
        words = [*words, "with reference"] if self.reference else words
        return f"{' '.join(words)} per {self.per}"

    def __str__(self) -> str:
        return f"{self.figure} ({self.when})" if self.when else self.figure

    def applies(self, method: Any) -> bool:
        """Whether the method's parameters fulfil the condition."""
        parts = self.when.split(" or ") if self.when else []
        return not parts or any(all(_holds(method, one) for one in part.split(" and ")) for part in parts)

    def value(self, method: Any) -> float:
        """The amount for the method's parameters."""
        first, *rest = self.amount.split()
        total = _number(method, first)
        for sign, word in zip(rest[::2], rest[1::2], strict=True):
            number = _number(method, word)
            total = {"*": total * number, "/": total / number, "+": total + number}[sign]
        return total


def _number(method: Any, word: str) -> float:
    return float(word) if word.replace(".", "", 1).isdigit() else float(getattr(method, word))


def _holds(method: Any, condition: str) -> bool:
    name, colon, wanted = condition.partition(": ")
    if not colon:
        set_ = bool(getattr(method, name.removeprefix("no ")))
        return not set_ if name.startswith("no ") else set_
    value = getattr(method, name)
    # Of a value such as "model:PATH" the kind decides.
    values = value if isinstance(value, tuple | list) else [str(value).partition(":")[0]]
    return wanted in values


def described(charges: Iterable[Charge], also: str = "") -> str:
    """The figures in words, behind what the method says itself."""
    return "; ".join([*([also] if also else []), *map(str, charges)])


def charged(
    charges: Iterable[Charge],
    method: Any,
    units: Mapping[str, float],
    has_reference: bool,
    helper_reference: bool | None = None,
) -> dict[str, tuple[float, float]]:
    """
    Examples by name of the counter that the charges come to: the least and the most of them.

    `has_reference` says whether the run asks its reference model; `helper_reference`, by default the same, whether a
    helper asks its own: what the run has precomputed is of another model.
    """
    helped = has_reference if helper_reference is None else helper_reference
    total: dict[str, tuple[float, float]] = {}
    for charge in charges:
        if not charge.applies(method):
            continue
        count = charge.value(method) * units[charge.per]
        names = [*PARTS.get(charge.what, (charge.what,))]
        if charge.reference and (helped if charge.what.startswith("helper_") else has_reference):
            names.append(REFERENCES[charge.what])
        for name in names:
            least, most = total.get(name, (0.0, 0.0))
            total[name] = (least if charge.at_most else least + count, most + count)
    return {name: counts for name, counts in total.items() if counts[1]}
