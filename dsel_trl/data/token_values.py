"""Values that a dataset holds for each turn, part or token of a row, laid out along the tokens that are trained."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .columns import _arrow_column, is_list_column, list_lengths
from .rows import Rows

PER = ("turn", "part", "token")
COUNTED = {
    "turn": "turns",
    "part": "parts (prompt and completion)",
    "token": "trained tokens (the end token included)",
}
# Where the trainer says which tokens are the completion's, as long as that decides nothing of the loss.
PARTS = "completion_mask"


@dataclass(frozen=True)
class TokenValues:
    """
    One value for each trained token after the first of every row: those that have a log-probability.

    Attributes:
        values (`np.ndarray` of float32):
            The values, row after row.
        offsets (`np.ndarray` of int64 of shape `(N + 1,)`):
            Where the values of each row begin.
    """

    values: np.ndarray
    offsets: np.ndarray

    def of(self, ids: np.ndarray) -> np.ndarray:
        """The values of some rows, one after another."""
        return np.concatenate([self.values[self.offsets[i] : self.offsets[i + 1]] for i in ids])


def token_values(rows: Rows, name: str, per: str) -> TokenValues:
    """
    A column of lists with a number for each turn (run of trained tokens) or trained token of a sequence, or with two
    numbers, of which the first is for the tokens of the prompt and the second for those of the completion.

    Where truncation has shortened a row, its list is shortened at the same end; two parts remain two. A null in the
    place of a list or of a number is 0.

    Args:
        rows ([`~dsel_trl.data.rows.Rows`]):
            Tokenised sequences.
        name (`str`):
            The column.
        per (`str`):
            `"turn"`, `"part"` or `"token"`.

    Raises:
        `ValueError`: if the column holds no lists of numbers, one of them is infinite, a list has not one number for
            each turn or token, or prompts are not trained on.
    """
    if not is_list_column(rows.dataset, name):
        raise ValueError(
            f"per={per!r} needs lists of numbers, but column {name!r} holds "
            f"{_arrow_column(rows.dataset, name).type}. Set per='example' for one weight a row."
        )
    column = _arrow_column(rows.dataset, name).combine_chunks()
    numbers = column.flatten()
    kind = numbers.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise ValueError(f"Column {name!r} holds lists of {kind}, but lists of numbers are needed.")
    values = pc.cast(numbers, pa.float32()).to_numpy(zero_copy_only=False)
    given = list_lengths(rows.dataset, name).astype(np.int64)
    if len(infinite := np.flatnonzero(np.isinf(values))):
        row = rows.positions[np.searchsorted(np.cumsum(given), infinite[0], side="right")]
        raise ValueError(
            f"Column {name!r} holds {values[infinite[0]]} in the list of row {row}, but a weight is a finite number."
        )
    values = np.nan_to_num(values)
    null = column.is_null().to_numpy(zero_copy_only=False)
    totals = rows.lengths.astype(np.int64)
    trained, starts = _trained(rows, totals)
    ends = np.cumsum(totals)
    row_of = np.repeat(np.arange(len(totals)), totals)[trained]
    begins = np.cumsum(given) - given
    if per == "part":
        unit, needed = _parts(rows, totals)[trained], np.full(len(totals), 2)
        cut = np.zeros(len(totals), dtype=bool)
    else:
        counted = np.concatenate([[0], np.cumsum(trained & starts if per == "turn" else trained)])
        before = counted[ends - totals]
        unit, needed = counted[1:][trained] - 1 - before[row_of], counted[ends] - before
        cut = np.zeros(len(totals), dtype=bool) if rows.max_length is None else totals == rows.max_length
        begins = begins + (given - needed if rows.truncation == "keep_end" else 0)
    wrong = np.flatnonzero((given != needed) & ~null & ~((given > needed) & cut))
    if len(wrong):
        row = wrong[0]
        raise ValueError(
            f"Column {name!r} has {given[row]} weights at row {rows.positions[row]}, whose {COUNTED[per]} are "
            f"{needed[row]}: per={per!r} needs one for each. {len(wrong)} of {len(totals)} rows are so."
        )
    place = unit + begins[row_of]
    known = ~null[row_of]
    along = np.zeros(len(row_of), dtype=np.float32)
    along[known] = values[place[known]]
    # Nothing predicts the first token of a row.
    first = np.zeros(len(trained), dtype=bool)
    first[(ends - totals)[totals > 0]] = True
    predicted = ~first[trained]
    sizes = np.bincount(row_of[predicted], minlength=len(totals))
    return TokenValues(along[predicted], np.concatenate([[0], np.cumsum(sizes)]))


def _trained(rows: Rows, totals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which tokens of all rows, one after another, are trained, and which of them follow one that is not."""
    if "labels" in rows.column_names:
        labels = _arrow_column(rows.dataset, "labels").combine_chunks().flatten()
        trained = labels.to_numpy(zero_copy_only=False) != -100
    else:
        trained = np.ones(int(totals.sum()), dtype=bool)
    starts = np.ones(len(trained), dtype=bool)
    starts[1:] = ~trained[:-1]
    starts[(np.cumsum(totals) - totals)[totals > 0]] = True
    return trained, starts


def _parts(rows: Rows, totals: np.ndarray) -> np.ndarray:
    """Of all tokens, one after another: 0 where they are of the prompt, 1 where they are of the completion."""
    if PARTS not in rows.column_names:
        raise ValueError(
            "per='part' weighs prompts beside completions, but these rows do not say where a trained prompt ends: "
            "train prompt-completion data with completion_only_loss=False."
        )
    lengths = list_lengths(rows.dataset, PARTS).astype(np.int64)
    if np.any(lengths < totals):
        raise ValueError(f"Column {PARTS!r} must have a number for each token of its row.")
    mask = _arrow_column(rows.dataset, PARTS).combine_chunks().flatten().to_numpy(zero_copy_only=False)
    # The trainer cuts the tokens, not the mask.
    begins = np.cumsum(lengths) - lengths + (lengths - totals if rows.truncation == "keep_end" else 0)
    along = np.arange(int(totals.sum())) - np.repeat(np.cumsum(totals) - totals, totals)
    return mask[np.repeat(begins, totals) + along].astype(np.int64)
