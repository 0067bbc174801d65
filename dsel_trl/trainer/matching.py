"""Which example each row of a collated batch is: rows are told apart by their tokens where a collator is not TRL's."""

from collections.abc import Sequence
from typing import Any

import torch

from ..data.rows import Layout
from .kto import Collator

# Collators of these packages keep rows in their order and leave none out.
TRUSTED = ("trl.", "transformers.")


def is_trusted(collator: Collator) -> bool:
    """Whether a collator is known to give one example per row that it gets, in the same order."""
    # What stands around the user's collator keeps its order.
    while type(collator).__module__.startswith(__package__):
        collator = collator.collator  # type: ignore[attr-defined]
    return type(collator).__module__.startswith(TRUSTED)


def matched(
    batch: dict[str, Any], rows: Sequence[dict[str, Any]], layout: Layout, collator: Collator
) -> list[int] | None:
    """
    Positions in `rows` of the examples of a batch that a collator made of them.

    An example is found by the tokens of its sequences, as far as truncation has left them. Where rows hold no tokens
    (the collator makes them), each is collated alone and compared with the batch.

    Args:
        batch (`dict`):
            What the collator gave.
        rows (`Sequence[dict]`):
            What it was given.
        layout ([`~dsel_trl.data.rows.Layout`]):
            Where rows hold their tokens; of pairs a batch holds all chosen sequences first.
        collator (`Callable`):
            The collator.

    Returns:
        `list[int]`, or `None` where an example of the batch is none of the rows.

    Time: proportional to the tokens of the batch; twice the collator's own where rows hold no tokens.
    """
    if is_trusted(collator):
        return list(range(len(rows)))
    found = _examples(batch, layout)
    expected = [_sequences(row, layout) for row in rows]
    if any(sequences is None for sequences in expected):
        alone = [_examples(collator([row]), layout) for row in rows]
        expected = [examples[0] if examples is not None and len(examples) == 1 else None for examples in alone]
    if found is None:
        return None
    left = list(range(len(rows)))
    positions = []
    for example in found:
        place = next((place for place in left if _same(example, expected[place])), None)
        if place is None:
            return None
        left.remove(place)
        positions.append(place)
    return positions


def in_order(batch: dict[str, Any], positions: Sequence[int], layout: Layout) -> dict[str, Any]:
    """A collated batch with its examples in the order of the rows that it was made of."""
    order = torch.tensor(positions).argsort()
    size = len(positions)
    if order.tolist() == list(range(size)):
        return batch
    rows = torch.cat([order + side * size for side in range(layout.sequences)])
    places = {size: order, size * layout.sequences: rows}
    return {
        key: value[places[len(value)].to(value.device)]
        if isinstance(value, torch.Tensor) and value.dim() and len(value) in places
        else value
        for key, value in batch.items()
    }


def per_row(values: torch.Tensor, rows: int) -> torch.Tensor:
    """
    Values of examples in the layout of their batch's rows, by which batches are joined and shared among processes:
    once for each sequence of an example, or all in one row where all examples lie in one.
    """
    return values[None] if rows < len(values) else values.repeat(rows // len(values))


def per_example(values: torch.Tensor, layout: Layout) -> torch.Tensor:
    """
    What `per_row` was given.

    Raises:
        `ValueError`: if the sequences of examples have been torn apart on the way.
    """
    if values.dim() > 1:
        return values.flatten()
    sides = values.chunk(layout.sequences)
    if len(values) % layout.sequences or not all(torch.equal(sides[0], side) for side in sides[1:]):
        raise ValueError(
            "The chosen and the rejected sequences of a training batch are not those of the same examples: one "
            "process makes the batches of all and cuts them by rows, which tears pairs apart, and the trainer's loss "
            "takes what is left for pairs. Set accelerator_config={'dispatch_batches': False}; for a stream, which "
            "can be served in no other way, leave `split_batches` out and give it as many batches as fill every step."
        )
    return sides[0]


def _sequences(row: dict[str, Any], layout: Layout) -> list[list[int]] | None:
    """Token ids of the sequences of a row; `None` where it holds none."""
    prefix = row.get("prompt_ids", []) if layout.prompts else []
    names = [f"{side}_ids" for side in layout.sides] or ["input_ids"]
    if (layout.prompts and "prompt_ids" not in row) or not all(name in row for name in names):
        return None
    return [list(prefix) + list(row[name]) for name in names]


def _examples(batch: dict[str, Any], layout: Layout) -> list[list[list[int]]] | None:
    """Token ids of the sequences of every example of a batch; `None` where it is not laid out one row each."""
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or len(ids) % layout.sequences:
        return None
    kept = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    if kept.shape != ids.shape:
        return None
    sequences = [row[own].tolist() for row, own in zip(ids, kept, strict=True)]
    size = len(sequences) // layout.sequences
    return [sequences[i::size] for i in range(size)]


def _same(found: list[list[int]], expected: list[list[int]] | None) -> bool:
    """Whether sequences are those expected, or what truncation has left of them at either end."""
    if expected is None or len(found) != len(expected):
        return False
    for own, whole in zip(found, expected, strict=True):
        count = len(own)
        if count > len(whole) or (count == 0 and whole) or own not in (whole[:count], whole[len(whole) - count :]):
            return False
    return True
