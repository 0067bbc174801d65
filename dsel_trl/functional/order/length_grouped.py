"""Length-grouped order: random at large, of similar length inside a batch (as `transformers` does it)."""

import numpy as np
from numpy.typing import ArrayLike, NDArray


def mega_batch_multiplier(n: int, batch_size: int) -> int:
    """
    Number of batches that are sorted together: at most 50, and at least four mega-batches where the data allow it.

    Args:
        n (`int`):
            Number of examples.
        batch_size (`int`):
            Examples per optimizer step.

    Returns:
        `int`: at least 1.

    Raises:
        `ValueError`: if `batch_size` is not positive.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}")
    return max(1, min(n // (4 * batch_size), 50))


def length_grouped_order(
    lengths: ArrayLike,
    batch_size: int,
    permutation: ArrayLike,
    mega_batch_mult: int | None = None,
) -> NDArray[np.int64]:
    """
    Orders the examples so that consecutive batches hold examples of similar length.

    The permutation is cut in mega-batches, each is sorted from long to short, and the longest example of all is put
    first, so that a run that does not fit in memory fails at once. The result is the one of
    `transformers.trainer_pt_utils.get_length_grouped_indices` for the same permutation.

    Args:
        lengths (`array` of shape `(N,)`):
            Tokens of every example.
        batch_size (`int`):
            Examples per optimizer step.
        permutation (`array` of int of shape `(N,)`):
            Random order to start from, for example `rng.permutation(N)`.
        mega_batch_mult (`int`, *optional*):
            Batches per mega-batch. Defaults to [`mega_batch_multiplier`].

    Returns:
        `np.ndarray` of int64 of shape `(N,)`: a permutation of `0..N-1`.

    Raises:
        `ValueError`: if the permutation does not fit the lengths, or a size is not positive.

    Example:

    ```python
    >>> from dsel_trl.functional.order.length_grouped import length_grouped_order

    >>> length_grouped_order([5, 9, 3, 7], batch_size=2, permutation=[2, 0, 1, 3]).tolist()
    [1, 2, 0, 3]
    ```
    """
    tokens = np.asarray(lengths)
    order = np.asarray(permutation, dtype=np.int64)
    if tokens.shape != order.shape or tokens.ndim != 1:
        raise ValueError(f"`permutation` of shape {order.shape} does not fit `lengths` of shape {tokens.shape}")
    multiplier = mega_batch_multiplier(len(tokens), batch_size) if mega_batch_mult is None else mega_batch_mult
    if multiplier < 1:
        raise ValueError(f"`mega_batch_mult` must be at least 1, got {mega_batch_mult}")
    if len(tokens) == 0:
        return order
    size = multiplier * batch_size
    block = np.arange(len(order)) // size
    grouped = order[np.lexsort((-tokens[order].astype(np.float64), block))]
    heads = np.arange(0, len(grouped), size)
    longest = heads[np.argmax(tokens[grouped[heads]])]
    grouped[[0, longest]] = grouped[[longest, 0]]
    return grouped
