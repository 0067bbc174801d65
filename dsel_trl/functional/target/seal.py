"""SEAL: a logit for each example, learned so that training on the data goes with a trusted set (2410.07471)."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Ids = NDArray[np.int64]

ACTIVATIONS = ("softmax", "sigmoid")
# Beyond this a weight is as good as zero, or the only one.
LIMIT = 10.0


def selector_weights(logits: ArrayLike, activation: str = "softmax") -> Floats:
    """
    Weights of the examples by their logits, `(N,)`: `N softmax(logits)`, of mean 1, or `2 sigmoid(logits)` in (0, 2).

    Args:
        logits (`array` of shape `(N,)`):
            One per example.
        activation (`str`, *optional*, defaults to `"softmax"`):
            One of `ACTIVATIONS`.

    Raises:
        `ValueError`: for an unknown activation.
    """
    values = np.asarray(logits, dtype=np.float64)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is none of {list(ACTIVATIONS)}.")
    if activation == "sigmoid":
        odds: Floats = np.exp(-values)
        sigmoid: Floats = 1 / (1 + odds)
        return 2 * sigmoid
    shares: Floats = np.exp(values - values.max())
    weights: Floats = shares * (len(values) / shares.sum())
    return weights


def selector_gradient(logits: ArrayLike, ids: ArrayLike, losses: ArrayLike, activation: str = "softmax") -> Floats:
    """
    Gradient of `mean over ids of w_i(logits) l_i` by all logits, `(N,)` (hf.co/papers/2410.07471, Algorithm 2).

    Args:
        logits (`array` of shape `(N,)`):
            One per example.
        ids (`array` of int of shape `(b,)`):
            Examples of the step; one may come twice. Those whose loss is not finite are left out.
        losses (`array` of shape `(b,)`):
            Their losses, taken as numbers.
        activation (`str`, *optional*, defaults to `"softmax"`):
            See [`selector_weights`].
    """
    ids, losses = _known(ids, losses)
    gradient = np.zeros(len(np.asarray(logits)))
    if not len(ids):
        return gradient
    weights = selector_weights(logits, activation)
    if activation == "sigmoid":
        np.add.at(gradient, ids, weights[ids] * (1 - weights[ids] / 2) * losses)
        return gradient / len(ids)
    np.add.at(gradient, ids, weights[ids] * losses)
    common: Floats = weights * (gradient.sum() / len(weights))
    return (gradient - common) / len(ids)


def sparse_update(
    logits: ArrayLike, ids: ArrayLike, losses: ArrayLike, learning_rate: float, activation: str = "softmax"
) -> Floats:
    """
    The logits after a step that moves those of its examples alone, `(N,)`.

    `o_i - learning_rate w_i (l_i - l)`, `l` being the weighted mean loss of the step: what the others would have
    moved by in common is left out, so how often an example is visited does not decide its rank.

    Args:
        logits, ids, losses, activation:
            As in [`selector_gradient`].
        learning_rate (`float`):
            Step size.
    """
    ids, losses = _known(ids, losses)
    moved = np.array(logits, dtype=np.float64)
    if len(ids):
        weights = selector_weights(moved, activation)[ids]
        baseline = (weights * losses).sum() / max(weights.sum(), 1e-12)
        np.add.at(moved, ids, -learning_rate * weights * (losses - baseline))
    return np.clip(moved, -LIMIT, LIMIT)


class Moments(NamedTuple):
    """What Adam keeps of a vector's gradients: their running means, those of their squares, and the steps made."""

    mean: Floats
    square: Floats
    steps: int


def adam_update(
    values: ArrayLike,
    gradient: ArrayLike,
    moments: Moments,
    learning_rate: float,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
) -> tuple[Floats, Moments]:
    """
    The values after a step of Adam (hf.co/papers/1412.6980, Algorithm 1), `(N,)`, and its moments.

    Args:
        values, gradient (`array` of shape `(N,)`):
            What moves, and where it is steep.
        moments ([`Moments`]):
            Those of the steps before; zeros at first.
        learning_rate, betas, eps:
            Adam's own.
    """
    slope, (first, second) = np.asarray(gradient, dtype=np.float64), betas
    mean = first * moments.mean + (1 - first) * slope
    square = second * moments.square + (1 - second) * slope**2
    steps = moments.steps + 1
    unbiased = mean / (1 - first**steps), square / (1 - second**steps)
    moved = np.asarray(values, dtype=np.float64) - learning_rate * unbiased[0] / (np.sqrt(unbiased[1]) + eps)
    return moved, Moments(mean, square, steps)


def upper_weight(start: float, decay: float, passes: int) -> float:
    """Share of the trusted loss after some passes over the data: `start - decay * passes`, kept in [0, 1]."""
    return min(1.0, max(0.0, start - decay * passes))


def _known(ids: ArrayLike, losses: ArrayLike) -> tuple[Ids, Floats]:
    own, values = np.asarray(ids, dtype=np.int64), np.asarray(losses, dtype=np.float64)
    finite = np.isfinite(values)
    return own[finite], values[finite]
