"""Reward-augmented data: a pair becomes two, each conditioned on a requested quality
(https://hf.co/papers/2410.08067).

Asked for the quality of the chosen answer the order stays; asked for that of the rejected answer it is reversed.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..ranking import Ids, rank_order

Messages = list[dict[str, Any]]
Goal = float | Mapping[str, float]
"""A score to ask for, or those of several attributes by name."""


def format_score(score: float) -> str:
    """A score as a prompt shows it: `9.0` becomes `9`, `6.5` stays `6.5`. Raises `ValueError` if it is not finite."""
    if not math.isfinite(score):
        raise ValueError(f"a goal must be a finite score, but is {score}")
    return str(int(score)) if float(score).is_integer() else str(float(score))


def goal_text(score: Goal, template: str) -> str:
    """
    The sentence that requests a quality.

    Args:
        score (`float` or mapping from `str` to `float`):
            The requested score, or those of several attributes, which become `helpfulness 4, verbosity 2`.
        template (`str`):
            Text with one slot `{g}`.

    Raises:
        `ValueError`: if the template has no slot `{g}`, a score is not finite, or there is none.
    """
    if isinstance(score, Mapping):
        if not score:
            raise ValueError("a goal of several attributes needs at least one, but has none")
        shown = ", ".join(f"{name} {format_score(value)}" for name, value in score.items())
    else:
        shown = format_score(score)
    if "{g}" not in template:
        raise ValueError(f"the goal template needs the slot {{g}}, but is {template!r}")
    return template.replace("{g}", shown)


def add_goal(
    messages: Messages | str, goal: str, system_role: bool = True, existing_system: str = "merge"
) -> Messages | str:
    """
    A copy of a conversation, or of a plain text, that starts with a requested quality.

    Args:
        messages (list of `dict` or `str`):
            Messages with `role` and `content`. A plain text is prefixed with the goal and an empty line.
        goal (`str`):
            From [`goal_text`].
        system_role (`bool`, *optional*, defaults to `True`):
            Whether the chat template knows a system message. If not, the first user message is prefixed with the goal
            and an empty line.
        existing_system (`str`, *optional*, defaults to `"merge"`):
            What to do if there is a system message: `"merge"` prefixes it, `"insert"` puts a second one before it.

    Returns:
        list of `dict` or `str`: new messages; the input is left alone.

    Raises:
        `ValueError`: if there is no message to condition or `existing_system` is unknown.
    """
    if existing_system not in ("merge", "insert"):
        raise ValueError(f'existing_system must be "merge" or "insert", but is {existing_system!r}')
    if isinstance(messages, str):
        return f"{goal}\n\n{messages}"
    roles = [message["role"] for message in messages]
    has_system = bool(roles) and roles[0] == "system"
    if system_role and not (has_system and existing_system == "merge"):
        return [{"role": "system", "content": goal}, *(dict(message) for message in messages)]
    role = "system" if system_role else "user"
    if role not in roles:
        raise ValueError(f"no {role} message can carry the requested quality: the roles are {roles}")
    first = roles.index(role)
    return [
        {**message, "content": f"{goal}\n\n{message['content']}"} if position == first else dict(message)
        for position, message in enumerate(messages)
    ]


def goal_rows(
    row: Mapping[str, Any],
    chosen_score: Goal,
    rejected_score: Goal,
    template: str,
    system_role: bool = True,
    existing_system: str = "merge",
    as_shipped: bool = False,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """
    The two conditioned rows of a pair.

    Args:
        row (mapping from `str`):
            Holds `chosen` and `rejected`. A `prompt` carries the goal where there is one; else both sides are whole
            conversations and each carries it. What else the row holds is kept.
        chosen_score, rejected_score (`float` or mapping from `str` to `float`):
            Absolute scores of the two answers, or of their attributes by name.
        template (`str`):
            See [`goal_text`].
        system_role (`bool`, *optional*, defaults to `True`), existing_system (`str`, *optional*, defaults to
        `"merge"`):
            See [`add_goal`].
        as_shipped (`bool`, *optional*, defaults to `False`):
            Repeats a defect of the released code without a system role: the answers of the second row are not swapped,
            and its rejected side carries the goal twice.

    Returns:
        Two `dict`: the positive row (goal = chosen score, order kept) and the negative row (goal = rejected score,
        order reversed).
    """
    defect = as_shipped and not system_role
    high, low = goal_text(chosen_score, template), goal_text(rejected_score, template)
    carriers = ("prompt",) if "prompt" in row else ("chosen", "rejected")

    def condition(side: Mapping[str, Any], goal: str, names: Sequence[str]) -> dict[str, Any]:
        return {**side, **{name: add_goal(side[name], goal, system_role, existing_system) for name in names}}

    positive = condition(row, high, carriers)
    if defect:
        return positive, condition(condition(row, low, carriers), low, carriers[-1:])
    return positive, condition({**row, "chosen": row["rejected"], "rejected": row["chosen"]}, low, carriers)


def augmentable(
    chosen_scores: ArrayLike,
    rejected_scores: ArrayLike,
    *,
    keep_equal: bool = False,
    half: bool = False,
    rng: np.random.Generator | None = None,
) -> Ids:
    """
    The pairs to augment: those whose scores agree with their order.

    Args:
        chosen_scores, rejected_scores (array-like of shape `(n,)` or `(n, k)`):
            Absolute scores, or those of k attributes, whose mean says the order. A pair with a missing or infinite
            score is left out.
        keep_equal (`bool`, *optional*, defaults to `False`):
            Whether to keep pairs of equal scores, as the reference does. Their two rows contradict each other. With
            attributes a pair of one mean is equal only where every attribute is: else its rows ask for two things.
        half (`bool`, *optional*, defaults to `False`):
            Draws half of the pairs (rounded up), so that the augmented set is as large as the original.
        rng (`np.random.Generator`, *optional*):
            Needed for `half`.

    Returns:
        `np.ndarray` of int64: positions in ascending order.

    Raises:
        `ValueError`: if `half` is asked for without `rng`.
    """
    high, low = np.asarray(chosen_scores, dtype=np.float64), np.asarray(rejected_scores, dtype=np.float64)
    high, low = (side.reshape(len(side), -1) for side in (high, low))
    known = (np.isfinite(high) & np.isfinite(low)).all(axis=1)
    with np.errstate(invalid="ignore"):
        margin = np.where(known, high.sum(axis=1) - low.sum(axis=1), np.nan)
    told_apart = keep_equal | (high != low).any(axis=1)
    ids = np.flatnonzero((margin > 0) | ((margin == 0) & told_apart))
    if not half:
        return ids
    if rng is None:
        raise ValueError("half=True draws at random: pass rng=numpy.random.default_rng(seed), got None")
    return np.sort(rng.choice(ids, size=(len(ids) + 1) // 2, replace=False))


def implicit_scores(rewards: ArrayLike, low: float = 1.0, high: float = 10.0) -> NDArray[np.float64]:
    """
    Absolute scores for responses without a judge: the rank of their implicit reward, spread evenly over a scale.

    Args:
        rewards (array-like of shape `(n,)`):
            Implicit rewards `beta * (lp - rp)` of all responses.
        low (`float`, *optional*, defaults to `1.0`), high (`float`, *optional*, defaults to `10.0`):
            Ends of the scale.

    Returns:
        `np.ndarray` of float64, shape `(n,)`: `low + (high - low) * rank / (m - 1)` over the m finite rewards, the
        lowest reward first and ties by position; NaN where the reward is not finite.
    """
    values = np.asarray(rewards, dtype=np.float64)
    n_valid = int(np.isfinite(values).sum())
    scores = np.full(len(values), np.nan)
    ranks = np.arange(n_valid) / max(n_valid - 1, 1)
    scores[rank_order(values, descending=False)[:n_valid]] = low + (high - low) * ranks
    return scores
