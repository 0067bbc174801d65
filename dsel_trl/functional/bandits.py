"""Which of several sources to draw from next: bandit arms by upper confidence bounds (https://hf.co/papers/2409.16986)."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ids = NDArray[np.int64]


def ucb_scores(pulls: NDArray, means: NDArray, alpha: float = 1.0) -> Floats:
    """
    `mean + alpha * sqrt(2 ln(all pulls) / pulls)` of each arm, `(K,)`; infinite for an arm that was never pulled.

    Args:
        pulls (`np.ndarray` of shape `(K,)`):
            How often each arm was pulled.
        means (`np.ndarray` of shape `(K,)`):
            Its mean reward; not looked at where it was never pulled.
        alpha (`float`, *optional*, defaults to `1.0`):
            How much what is little known counts; 0 goes by the means alone.
    """
    total = max(float(pulls.sum()), 1.0)
    bonus = alpha * np.sqrt(2.0 * np.log(total) / np.maximum(pulls, 1))
    return np.where(pulls > 0, means + bonus, np.inf)


def best_arms(scores: Floats, count: int, available: NDArray[np.bool_] | None = None) -> Ids:
    """
    The `count` arms of the highest scores, best first, ties to the lower index; fewer where fewer are `available`.

    An arm with an unknown score (NaN) comes after all others.
    """
    known = np.where(np.isnan(scores), -np.inf, scores)
    order = np.argsort(-known, kind="stable")
    if available is not None:
        order = order[available[order]]
    return order[:count].astype(np.int64)


def pull(
    pulls: NDArray, means: NDArray, arms: NDArray, rewards: NDArray, discount: float = 0.0
) -> tuple[NDArray, Floats]:
    """
    Counts and mean rewards after a round; the arguments stay as they are.

    Args:
        pulls, means (`np.ndarray` of shape `(K,)`):
            Before the round.
        arms (`np.ndarray` of shape `(m,)`, int64):
            The arms that were pulled, each once.
        rewards (`np.ndarray` of shape `(m,)`):
            What they gave; a reward that is not finite is no pull.
        discount (`float`, *optional*, defaults to `0.0`):
            Weight of a new reward in the mean, for rewards that change with time; 0 takes the mean of all of them.
    """
    known = np.isfinite(rewards)
    arms, rewards = arms[known], rewards[known]
    pulls, means = pulls.copy(), np.array(means, dtype=np.float64)
    pulls[arms] += 1
    share = np.where(pulls[arms] == 1, 1.0, discount) if discount else 1.0 / pulls[arms]
    before = np.where(pulls[arms] == 1, 0.0, means[arms])
    means[arms] = before + share * (rewards - before)
    return pulls, means


def draw_in_rounds(
    ids: Ids,
    labels: NDArray,
    pulls: NDArray,
    means: NDArray,
    *,
    arms: int,
    draws: int,
    alpha: float,
    limit: int,
    rng: np.random.Generator,
) -> Ids:
    """
    `ids` in the order in which a bandit would draw them whose rewards come later.

    Each round takes the best `arms` that have something left, and `draws` at random of each, mixed with each other.
    Until rewards come, a round counts as a pull that has changed no mean, so that the rounds of one plan spread; an
    arm without a reward is taken for one of the reward 0. What is left after `limit` ids comes in random order.

    Args:
        ids (`np.ndarray` of shape `(n,)`, int64):
            What may be drawn.
        labels (`np.ndarray` of shape `(n,)`, int):
            The arm of each, below K; negative = of no arm: these come last.
        pulls, means (`np.ndarray` of shape `(K,)`):
            State of the bandit.
        arms, draws, limit (`int`):
            Arms per round, ids per arm and round, ids to draw in rounds.
        alpha (`float`):
            See [`ucb_scores`].
        rng (`np.random.Generator`):
            For the draws.
    """
    shuffled = rng.permutation(len(ids))
    ids, labels = ids[shuffled], labels[shuffled]
    own = labels >= 0
    by_arm = np.argsort(labels[own], kind="stable")
    waiting = ids[own][by_arm]
    left = np.bincount(labels[own], minlength=len(pulls))
    first = np.cumsum(left) - left
    taken = np.zeros(len(waiting), dtype=bool)
    pulls, means, rounds = pulls.copy(), np.where(pulls > 0, means, 0.0), []
    drawn = 0
    while left.any() and drawn < limit:
        chosen = best_arms(ucb_scores(pulls, means, alpha), arms, left > 0)
        places = np.concatenate([np.arange(first[arm], first[arm] + min(draws, left[arm])) for arm in chosen])
        sizes = np.minimum(draws, left[chosen])
        first[chosen] += sizes
        left[chosen] -= sizes
        pulls[chosen] += 1
        taken[places] = True
        drawn += len(places)
        rounds.append(waiting[rng.permutation(places)])
    rest = waiting[~taken]
    return np.concatenate([*rounds, rest[rng.permutation(len(rest))], ids[~own]]).astype(np.int64)
