"""Preference pairs with labels turned on purpose, for an ablation over the rate of wrong labels."""

from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

from ..core.randomness import stream

FLIPPED = "truth_flipped"


def flip_labels(rows: Any, share: float, seed: int = 0) -> Dataset:
    """
    A copy of pairs in which the labels of a `share` are turned: every `*chosen*` column changes places with its
    `*rejected*` one, so that scores stay with their response. Which pairs they are does not depend on the run's seed.

    Pairs that a column `truth_flipped` marks are set right first; the copy has the column as it then is.

    Args:
        rows ([`~datasets.Dataset`]):
            Pairs.
        share (`float`):
            Share of them, in [0, 1].
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draw. A larger share turns those of a smaller one as well.

    Raises:
        `ValueError`: for rows that are no pairs, or a share that is none.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"flip={share!r} must be between 0 and 1.")
    if not isinstance(rows, Dataset) or not {"chosen", "rejected"} <= set(rows.column_names):
        raise ValueError("flip turns the labels of preference pairs: it needs the columns 'chosen' and 'rejected'.")
    order = stream(seed, "ablation/flip").permutation(len(rows))
    flipped = np.zeros(len(rows), dtype=bool)
    flipped[order[: round(share * len(rows))]] = True
    turned = flipped.copy()
    if FLIPPED in rows.column_names:
        turned ^= np.array(rows[FLIPPED]).astype(bool)
        rows = rows.remove_columns([FLIPPED])
    table = rows.data.table.combine_chunks() if rows._indices is None else rows.flatten_indices().data.table
    # The two sides in one table, of which each row takes its own or the exchanged.
    pairs = [(n, n.replace("chosen", "rejected")) for n in rows.column_names if "chosen" in n]
    names = {a: b for a, b in pairs if b in rows.column_names}
    names |= {b: a for a, b in names.items()}
    exchanged = table.select([names.get(name, name) for name in table.column_names])
    exchanged = exchanged.rename_columns(table.column_names).cast(table.schema)
    both = pa.concat_tables([table, exchanged])
    take = np.arange(len(rows)) + len(rows) * turned
    return Dataset(both.take(pa.array(take)), info=rows.info.copy()).add_column(FLIPPED, flipped)
