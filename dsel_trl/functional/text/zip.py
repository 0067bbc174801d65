"""ZIP: select the subset that compresses worst, which is the least redundant one (hf.co/papers/2407.06645).

DEFLATE sees 32 KiB back: redundancy with anything farther away is invisible, and a long selection mainly dilutes the
ratio.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ..ranking import bottom_k
from .zip_engine import CompressionEngine
from .zip_worker import Frame

Ids = NDArray[np.int64]
Serializer = str | Callable[[Any], str]

BURNT = 1_000_000.0
"""Redundancy of an example that has left the pool."""

FRAMES = {"repr": Frame(b"[", b", ", b"]"), "text": Frame(b"", b"\n", b"")}


class ZipRound(NamedTuple):
    """One round of the selection."""

    finalists: Ids
    """The `k2` examples that add most to what is selected, best first."""
    ratios: NDArray[np.float32]
    """Their compression ratios after the selection so far."""
    chosen: Ids
    """The `k3` finalists that are least alike, in the order in which they were chosen."""
    state: NDArray[np.float32]
    """Redundancy of all examples after the round."""


def serialize(examples: Sequence[Any], serializer: Serializer = "repr") -> tuple[list[bytes], Frame]:
    """
    Bytes of every example, and what stands around and between them.

    Args:
        examples (`Sequence`):
            Texts, or dicts like those of [`canonical_example`].
        serializer (`str` or `Callable`, *optional*, defaults to `"repr"`):
            `"repr"` writes the examples as a Python list, as the published code does, keys and quotes included.
            `"text"` joins them by newlines. A callable maps an example to its text, joined by newlines.

    Returns:
        `tuple[list[bytes], Frame]`.

    Raises:
        `ValueError`: if `serializer` is unknown.
    """
    if isinstance(serializer, str) and serializer not in FRAMES:
        raise ValueError(f'`serializer` must be "repr", "text" or a function, got {serializer!r}')
    if isinstance(serializer, str):
        frame = FRAMES[serializer]
        write: Callable[[Any], str] = repr if serializer == "repr" else str
    else:
        frame, write = FRAMES["text"], serializer
    return [write(example).encode("utf-8", "surrogatepass") for example in examples], frame


def canonical_example(example_id: int, turns: Sequence[tuple[str, str]], source: str = "") -> dict[str, Any]:
    """
    The dict whose `repr` the published code compresses.

    Args:
        example_id (`int`):
            Id of the example.
        turns (`Sequence[tuple[str, str]]`):
            Speaker and text of every turn; for a preference pair the prompt, the chosen and the rejected response.
        source (`str`, *optional*, defaults to `""`):
            Name of the data set.

    Returns:
        `dict` with the keys `id`, `conversations` and `source`, in that order.
    """
    conversations = [{"from": speaker, "value": text} for speaker, text in turns]
    return {"id": example_id, "conversations": conversations, "source": source}


def zip_rounds(
    examples: Sequence[Any],
    budget: int,
    *,
    k1: int = 10_000,
    k2: int = 200,
    k3: int = 100,
    serializer: Serializer = "repr",
    unchosen: str = "burn",
    anchor_ids: Sequence[int] = (),
    workers: int = 1,
    as_published: bool = False,
) -> Iterator[ZipRound]:
    """
    Runs the selection round by round until at least `budget` examples are chosen (hf.co/papers/2407.06645, Alg. 1).

    A round takes the `k1` examples of least known redundancy, measures them after the selection so far, keeps the `k2`
    best, and chooses `k3` of those greedily so that they are unlike each other. Redundancies of examples that are not
    among the `k1` stay as they were last measured: that is what makes the method cheap.

    Args:
        examples (`Sequence`):
            Texts or dicts.
        budget (`int`):
            Number of examples to choose.
        k1 (`int`, *optional*, defaults to `10000`):
            Examples of least known redundancy that a round measures again; clamped to what is left.
        k2 (`int`, *optional*, defaults to `200`):
            Finalists of a round.
        k3 (`int`, *optional*, defaults to `100`):
            Examples that a round chooses.
        serializer (`str` or `Callable`, *optional*, defaults to `"repr"`):
            See [`serialize`].
        unchosen (`str`, *optional*, defaults to `"burn"`):
            What becomes of the `k2 - k3` finalists that are not chosen: `"burn"` discards them for good, as the
            published code does, `"restore"` leaves them in the pool.
        anchor_ids (`Sequence[int]`, *optional*):
            Examples that count as selected before the first round, for example those of the epoch before.
        workers (`int`, *optional*, defaults to `1`):
            Processes that compress; the result does not depend on it.
        as_published (`bool`, *optional*, defaults to `False`):
            Repeat the published code to the letter. When fewer than `k1` examples are left, those that are gone come
            back, chosen ones included, so an example can be chosen several times; the pool never runs empty; a `k3`
            above `k2` chooses finalists again; and ties stand as `torch.topk` leaves them.

    Yields:
        `ZipRound`.

    Raises:
        `ValueError`: if a size is not positive or `unchosen` is unknown.
    """
    if min(budget, k1, k2, k3, workers) < 1:
        raise ValueError(f"all sizes must be positive, got {budget=}, {k1=}, {k2=}, {k3=}, {workers=}")
    if unchosen not in ("burn", "restore"):
        raise ValueError(f'`unchosen` must be "burn" or "restore", got {unchosen!r}')
    pieces, frame = serialize(examples, serializer)
    selected = [int(i) for i in anchor_ids]
    left = np.ones(len(pieces), dtype=np.bool_)
    left[selected] = False
    with CompressionEngine(pieces, frame, workers) as engine:
        state = engine.ratios("single", [], list(range(len(pieces)))).astype(np.float32)
        state[~left] = BURNT
        missing = budget
        while missing > 0 and left.any():
            pool = _lowest(np.where(left, state, np.nan), k1, as_published)
            pool = pool if as_published else np.sort(pool)
            state[pool] = engine.ratios("all", selected, pool.tolist())
            finalists = pool[_lowest(state[pool], k2, as_published)]
            ratios = state[finalists].copy()
            chosen = _least_alike(engine, finalists, k3, as_published)
            gone = finalists if unchosen == "burn" else chosen
            state[gone] = BURNT
            # The published code takes nothing out of the pool: what is gone only ranks behind everything else.
            left[gone] = as_published
            selected.extend(chosen.tolist())
            missing -= len(chosen)
            yield ZipRound(finalists, ratios, chosen, state.copy())
    if missing > 0:
        warnings.warn(f"the pool of {len(pieces)} examples ran empty {missing} short of the budget of {budget}")


def zip_select(
    examples: Sequence[Any],
    budget: int,
    *,
    k1: int = 10_000,
    k2: int = 200,
    k3: int = 100,
    serializer: Serializer = "repr",
    unchosen: str = "burn",
    truncate: bool = True,
    anchor_ids: Sequence[int] = (),
    workers: int = 1,
    watch: Callable[[ZipRound], None] | None = None,
) -> Ids:
    """
    Selects the examples that together are hardest to compress (hf.co/papers/2407.06645).

    Args:
        examples (`Sequence`):
            Texts or dicts.
        budget (`int`):
            Number of examples to choose.
        k1 (`int`, *optional*, defaults to `10000`):
            Examples of least known redundancy that a round measures again.
        k2 (`int`, *optional*, defaults to `200`):
            Finalists of a round.
        k3 (`int`, *optional*, defaults to `100`):
            Examples that a round chooses.
        serializer (`str` or `Callable`, *optional*, defaults to `"repr"`):
            See [`serialize`].
        unchosen (`str`, *optional*, defaults to `"burn"`):
            See [`zip_rounds`]. About `k2 / k3 * budget` examples are used up with `"burn"`.
        truncate (`bool`, *optional*, defaults to `True`):
            Return exactly `budget` ids. `False` keeps the last round whole, as the published code does.
        anchor_ids (`Sequence[int]`, *optional*):
            Examples that count as selected already; they are not returned.
        workers (`int`, *optional*, defaults to `1`):
            Processes that compress; the result does not depend on it.
        watch (`Callable`, *optional*):
            Called with each round when it is done.

    Returns:
        `np.ndarray` of int64: distinct ids, most novel first. Fewer than `budget`, with a warning, if the pool runs
        empty.

    Raises:
        `ValueError`: if a size is not positive or an option is unknown.

    Example:

    ```python
    >>> from dsel_trl.functional.text.zip import zip_select

    >>> texts = ["the cat sat on the mat", "the cat sat on a mat", "zip packs bytes"]
    >>> sorted(zip_select(texts, 2, k3=1, unchosen="restore", serializer="text").tolist())
    [1, 2]
    ```
    """
    rounds = zip_rounds(
        examples,
        budget,
        k1=k1,
        k2=k2,
        k3=k3,
        serializer=serializer,
        unchosen=unchosen,
        anchor_ids=anchor_ids,
        workers=workers,
    )
    chosen = [np.zeros(0, dtype=np.int64)]
    for step in rounds:
        chosen.append(step.chosen)
        if watch is not None:
            watch(step)
    ids = np.concatenate(chosen)
    return ids[:budget] if truncate else ids


def _least_alike(engine: CompressionEngine, finalists: Ids, k3: int, as_published: bool) -> Ids:
    """Greedy choice among the finalists; the anchor is only what was chosen in this round."""
    chosen: list[int] = []
    finalists = finalists if as_published else np.sort(finalists)
    left = np.ones(len(finalists), dtype=np.bool_)
    for _ in range(k3 if as_published else min(k3, len(finalists))):
        ratios = np.full(len(finalists), BURNT, dtype=np.float32)
        ratios[left] = engine.ratios("round", chosen, finalists[left].tolist())
        best = _lowest(ratios, 1, as_published)[0]
        chosen.append(int(finalists[best]))
        left[best] = False
    return np.array(chosen, dtype=np.int64)


def _lowest(values: NDArray[np.float32], k: int, as_published: bool) -> Ids:
    """Positions of the `k` lowest values; ties go to the lower position, or stand as `torch.topk` leaves them."""
    if not as_published:
        return bottom_k(values, k)
    positions: Ids = torch.topk(torch.from_numpy(values), min(k, len(values)), largest=False).indices.numpy()
    return positions
