"""EDGE, guideline effectiveness: how much a written guideline helps the model (hf.co/papers/2502.12494).

The formula is reconstructed from the published description: no code is public. Low = the guideline lacks what this
example needs = informative.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..ranking import selectable

Floats = NDArray[np.float64]

FORMS = ("ratio", "diff")
AGGREGATES = ("mean_turn", "mean_token", "min_turn")
TINY = 1e-8


def mean_turn_nll(token_nll: ArrayLike, turn: ArrayLike, num_turns: int) -> tuple[Floats, NDArray[np.int64]]:
    """
    Mean token loss of every turn.

    Args:
        token_nll (`array` of shape `(n,)`):
            Negative log-likelihoods of all action tokens, in nats.
        turn (`array` of int of shape `(n,)`):
            Turn of every token.
        num_turns (`int`):
            Number of turns; a turn may have no token.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: mean loss per turn, float64 of shape `(T,)`, NaN for an empty turn; number of
        tokens per turn, int64 of shape `(T,)`.
    """
    owner = np.asarray(turn, dtype=np.int64)
    counts = np.bincount(owner, minlength=num_turns).astype(np.int64)
    sums = np.bincount(owner, weights=np.asarray(token_nll, dtype=np.float64), minlength=num_turns)
    means = np.full(num_turns, np.nan)
    np.divide(sums, counts, out=means, where=counts > 0)
    return means, counts


def guideline_effect(loss_without: ArrayLike, loss_with: ArrayLike, form: str = "ratio") -> Floats:
    """
    Effect of the guideline on one turn (reconstruction of hf.co/papers/2502.12494, section 3).

    Args:
        loss_without (`array` of shape `(T,)`):
            Mean token loss of the action without the guideline in the prompt, in nats.
        loss_with (`array` of shape `(T,)`):
            Mean loss of the same tokens with the guideline.
        form (`str`, *optional*, defaults to `"ratio"`):
            `"ratio"`: without / with, 1 where both are zero. `"diff"`: without - with.

    Returns:
        `np.ndarray` of float64 of shape `(T,)`: large where the guideline helps; NaN where a loss is NaN.

    Raises:
        `ValueError`: if `form` is unknown or the shapes differ.
    """
    if form not in FORMS:
        raise ValueError(f'`form` must be "ratio" or "diff", got {form!r}')
    without, guided = np.asarray(loss_without, dtype=np.float64), np.asarray(loss_with, dtype=np.float64)
    if without.shape != guided.shape:
        raise ValueError(f"the two passes must score the same turns, got shapes {without.shape} and {guided.shape}")
    if form == "diff":
        return without - guided
    # Two certain actions: the guideline changed nothing, although the ratio would be 0.
    return np.where((without <= TINY) & (guided <= TINY), 1.0, without / np.maximum(guided, TINY))


def edge_scores(
    effect: ArrayLike,
    turn_example: ArrayLike,
    num_examples: int,
    *,
    aggregate: str = "mean_turn",
    num_tokens: ArrayLike | None = None,
) -> Floats:
    """
    Guideline effectiveness of every example from the effects of its turns.

    Args:
        effect (`array` of shape `(T,)`):
            Result of [`guideline_effect`]; NaN turns (no action) do not count.
        turn_example (`array` of int of shape `(T,)`):
            Example of every turn.
        num_examples (`int`):
            Number of examples.
        aggregate (`str`, *optional*, defaults to `"mean_turn"`):
            `"mean_turn"`: mean over the turns. `"mean_token"`: mean weighted by the turns' numbers of tokens.
            `"min_turn"`: the turn that the guideline helps least.
        num_tokens (`array` of shape `(T,)`, *optional*):
            Needed for `"mean_token"`.

    Returns:
        `np.ndarray` of float64 of shape `(num_examples,)`: NaN for an example without a scored turn.

    Raises:
        `ValueError`: if `aggregate` is unknown or `num_tokens` is missing.

    Example:

    ```python
    >>> from dsel_trl.functional.text.edge import edge_scores

    >>> edge_scores([1.0, 3.0, 2.0], [0, 0, 1], num_examples=2).tolist()
    [2.0, 2.0]
    ```
    """
    if aggregate not in AGGREGATES:
        raise ValueError(f"`aggregate` must be one of {', '.join(AGGREGATES)}, got {aggregate!r}")
    if aggregate == "mean_token" and num_tokens is None:
        raise ValueError('`aggregate="mean_token"` needs `num_tokens`')
    values, owner = np.asarray(effect, dtype=np.float64), np.asarray(turn_example, dtype=np.int64)
    scored = selectable(values)
    scores = np.full(num_examples, np.nan)
    if aggregate == "min_turn":
        np.fmin.at(scores, owner[scored], values[scored])
        return scores
    weight = np.ones(len(values)) if aggregate == "mean_turn" else np.asarray(num_tokens, dtype=np.float64)
    total = np.bincount(owner[scored], weights=(values * weight)[scored], minlength=num_examples)
    mass = np.bincount(owner[scored], weights=weight[scored], minlength=num_examples)
    np.divide(total, mass, out=scores, where=mass > 0)
    return scores
