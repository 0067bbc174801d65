"""InCo-DPO: prefixes of a strong model's answers, continued by the policy (https://hf.co/papers/2503.15880).

The prefix length trades reward against consistency with the policy. The selection rule is this package's own reading.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..ranking import keep_count, selectable


class ChosenRejected(NamedTuple):
    """Positions of the two sides of a pair among the candidates of a prompt."""

    chosen: int
    rejected: int


def prefix_length(length: int, ratio: float = 0.5, tokens: int | None = None) -> int:
    """
    Number of tokens of an off-policy response that are kept as a prefix.

    Args:
        length (`int`):
            Length of the response in the policy's tokens.
        ratio (`float`, *optional*, defaults to `0.5`):
            Share to keep, rounded down: 0 is pure on-policy, 1 pure off-policy.
        tokens (`int`, *optional*):
            Fixed number of tokens instead of a share; cut to the length of the response.

    Returns:
        `int` in [0, `length`].

    Raises:
        `ValueError`: if `ratio` is not in [0, 1], or a count is negative.
    """
    if not 0 <= ratio <= 1:
        raise ValueError(f"the prefix ratio must be in [0, 1], but is {ratio}")
    if length < 0 or (tokens is not None and tokens < 0):
        raise ValueError(f"lengths cannot be negative, but got length={length}, tokens={tokens}")
    if tokens is not None:
        return min(tokens, length)
    # `keep_count` guards the product against rounding; below one token it would still keep one.
    return keep_count(ratio, length) if ratio * length >= 1 else 0


def balanced_scores(
    rewards: ArrayLike, mean_logps: ArrayLike, consistency_weight: float = 0.05
) -> NDArray[np.float64]:
    """
    Reward plus consistency with the policy, `reward + weight * mean token log-probability`.

    Args:
        rewards (array-like of shape `(m,)`):
            Reward of each candidate of a prompt.
        mean_logps (array-like of shape `(m,)`):
            Mean token log-probability of the whole candidate under the policy.
        consistency_weight (`float`, *optional*, defaults to `0.05`):
            Weight of the second term.

    Returns:
        `np.ndarray` of float64, shape `(m,)`.
    """
    return np.asarray(rewards, dtype=np.float64) + consistency_weight * np.asarray(mean_logps, dtype=np.float64)


def choose_pair(
    rewards: ArrayLike, scores: ArrayLike | None = None, rejectable: ArrayLike | None = None
) -> ChosenRejected | None:
    """
    Makes a preference pair of scored candidates: the best score against the lowest reward.

    Args:
        rewards (array-like of shape `(m,)`):
            Reward of each candidate; one with a non-finite reward is left out.
        scores (array-like of shape `(m,)`, *optional*):
            What the chosen side maximises, for example [`balanced_scores`]. Defaults to the rewards.
        rejectable (array-like of bool, shape `(m,)`, *optional*):
            Candidates that may be rejected, for example the on-policy ones. Defaults to all.

    Returns:
        `ChosenRejected`, or `None` if the prompt gives no pair: fewer than two valid candidates, all of equal reward,
        or the same candidate on both sides. In a tie the chosen side takes the lower, the rejected side the higher
        index.
    """
    reward = np.asarray(rewards, dtype=np.float64)
    score = reward if scores is None else np.asarray(scores, dtype=np.float64)
    valid = selectable(reward) & selectable(score)
    losers = np.flatnonzero(valid if rejectable is None else valid & np.asarray(rejectable, dtype=bool))
    winners = np.flatnonzero(valid)
    if len(winners) < 2 or len(losers) == 0 or np.ptp(reward[winners]) == 0:
        return None
    chosen = int(winners[np.argmax(score[winners])])
    rejected = int(losers[::-1][np.argmin(reward[losers[::-1]])])
    return None if chosen == rejected else ChosenRejected(chosen, rejected)
