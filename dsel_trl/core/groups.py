"""What a run logs by the value of a column: by source, by language, by whatever a user's rows are marked with."""

import re
from dataclasses import dataclass

import numpy as np

from ..data.columns import text_codes
from ..data.rows import Rows
from .run import Step

MOST = 50


@dataclass(frozen=True)
class Groups:
    """
    Examples by the value of a text column.

    Args:
        column (`str`):
            The column.
        values (`list[str]`):
            Its values, sorted.
        codes (`np.ndarray` of shape `(N,)`):
            Position of each example's value in `values`.
    """

    column: str
    values: list[str]
    codes: np.ndarray

    @classmethod
    def of(cls, rows: Rows, column: str) -> "Groups":
        """
        The groups of rows.

        Raises:
            `ValueError`: if the column is absent, holds no texts, or has more than 50 values.
        """
        if column not in rows.column_names:
            raise ValueError(f"log_by={column!r}: there is no such column, only {sorted(rows.column_names)}.")
        values, codes = text_codes(rows.dataset, column)
        if len(values) > MOST:
            raise ValueError(
                f"log_by={column!r}: the column has {len(values)} different values (such as {values[0][:40]!r}), but "
                f"at most {MOST} are logged apart. Give a column that marks the source of a row."
            )
        return cls(column, values, codes)

    def names(self) -> list[str]:
        """`<column>=<value>` of each value: in a logged name, `/` and `=` have a meaning of their own."""
        return [f"{_escaped(self.column)}={_escaped(value)}" for value in self.values]

    def shares(self, mask: np.ndarray) -> list[float]:
        """Share of each group's examples for which `mask` `(N,)` is true."""
        counts = np.bincount(self.codes, minlength=len(self.values))
        return (np.bincount(self.codes[mask], minlength=len(self.values)) / np.maximum(counts, 1)).tolist()

    def chosen(self, candidates: np.ndarray, chosen: np.ndarray) -> list[float]:
        """Share of each group's `candidates` (ids) that were `chosen`, NaN where it had none."""
        drawn = np.bincount(self.codes[candidates], minlength=len(self.values)).astype(np.float64)
        taken = np.bincount(self.codes[chosen], minlength=len(self.values))
        return np.divide(taken, drawn, out=np.full(len(drawn), np.nan), where=drawn > 0).tolist()

    def window(self, steps: list[Step]) -> dict[str, float]:
        """Loss, margin and weight (means) and tokens (a sum) of each group that some steps have trained."""
        codes = self.codes[np.concatenate([step.ids for step in steps])]
        found: dict[str, float] = {}
        names = {"loss": "loss", "implicit_margin": "margin", "weight": "weight"}
        known = {name: _joined(steps, key) for key, name in names.items() if key in steps[0].values}
        known.setdefault("weight", np.ones(len(codes)))
        lengths = _joined(steps, "length") if "length" in steps[0].values else None
        for code, group in enumerate(self.names()):
            own = codes == code
            if not own.any():
                continue
            for name, values in known.items():
                finite = values[own][np.isfinite(values[own])]
                if len(finite):
                    found[f"{group}/{name}"] = float(finite.mean())
            if lengths is not None:
                found[f"{group}/tokens"] = float(lengths[own].sum())
        return found

    def totals(self, visits: np.ndarray) -> dict[str, dict[str, int]]:
        """Of each value: how many examples have it, and how many of them were trained (again and again counts)."""
        examples = np.bincount(self.codes, minlength=len(self.values))
        trained = np.bincount(self.codes, weights=visits, minlength=len(self.values))
        return {
            value: {"examples": int(examples[i]), "examples_trained": int(trained[i])}
            for i, value in enumerate(self.values)
        }


def _escaped(text: str) -> str:
    return re.sub(r"[/=%\x00-\x1f\x7f]", lambda found: f"%{ord(found[0]):02X}", text)


def _joined(steps: list[Step], name: str) -> np.ndarray:
    return np.concatenate([step.values[name] for step in steps]).astype(np.float64)
