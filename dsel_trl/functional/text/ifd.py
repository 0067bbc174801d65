"""Instruction-following difficulty: how little the instruction helps to predict the answer.

Cherry LLM takes a ratio of mean losses (hf.co/papers/2308.12032), Superfiltering one of perplexities of a small model
(hf.co/papers/2402.00530).
"""

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..ranking import bottom_k, top_k

Floats = NDArray[np.float64]
Ids = NDArray[np.int64]


def ifd_loss_ratio(loss_conditioned: ArrayLike, loss_direct: ArrayLike) -> Floats:
    """
    Cherry's IFD: mean loss of the answer given the instruction over mean loss of the answer alone.

    See hf.co/papers/2308.12032, Eq. 3. Scaling both losses leaves the ratio as it is; 1 means that the instruction
    does not help.

    Args:
        loss_conditioned (`array` of shape `(N,)`):
            Mean negative log-likelihood of the answer tokens given the instruction, in nats.
        loss_direct (`array` of shape `(N,)`):
            The same without the instruction, over the same answer tokens.

    Returns:
        `np.ndarray` of float64 of shape `(N,)`: NaN (not selectable) where a loss is unknown or `loss_direct` is 0.

    Raises:
        `ValueError`: if the shapes differ.

    Example:

    ```python
    >>> from dsel_trl.functional.text.ifd import ifd_loss_ratio

    >>> ifd_loss_ratio([1.0, 3.0], [2.0, 2.0]).tolist()
    [0.5, 1.5]
    ```
    """
    conditioned, direct = _pair(loss_conditioned, loss_direct)
    usable = np.isfinite(conditioned) & np.isfinite(direct) & (direct > 0)
    ratio = np.full(direct.shape, np.nan)
    np.divide(conditioned, direct, out=ratio, where=usable)
    return ratio


def ifd_perplexity_ratio(loss_conditioned: ArrayLike, loss_direct: ArrayLike) -> Floats:
    """
    Superfiltering's IFD: `exp(loss_conditioned - loss_direct)` (hf.co/papers/2402.00530, Eq. 2).

    Args:
        loss_conditioned (`array` of shape `(N,)`):
            Mean negative log-likelihood of the answer tokens given the instruction, in nats.
        loss_direct (`array` of shape `(N,)`):
            The same without the instruction, over the same answer tokens.

    Returns:
        `np.ndarray` of float64 of shape `(N,)`: NaN where a loss is unknown.

    Raises:
        `ValueError`: if the shapes differ.
    """
    conditioned, direct = _pair(loss_conditioned, loss_direct)
    with np.errstate(invalid="ignore", over="ignore"):
        ratio = np.exp(conditioned - direct)
    return np.where(np.isfinite(ratio), ratio, np.nan)


def ifd_from_perplexities(ppl_conditioned: ArrayLike, ppl_direct: ArrayLike, *, failed: float = math.nan) -> Floats:
    """
    Superfiltering's IFD from perplexities instead of losses.

    Args:
        ppl_conditioned (`array` of shape `(N,)`):
            Perplexity of the answer given the instruction.
        ppl_direct (`array` of shape `(N,)`):
            Perplexity of the answer alone.
        failed (`float`, *optional*, defaults to `nan`):
            Value where `ppl_direct` is 0, which is how a failed forward is recorded. The published scripts use 0, and
            may then select such an example as the easiest one.

    Returns:
        `np.ndarray` of float64 of shape `(N,)`.

    Raises:
        `ValueError`: if the shapes differ.
    """
    conditioned, direct = _pair(ppl_conditioned, ppl_direct)
    ratio = np.full(direct.shape, np.nan)
    np.divide(conditioned, direct, out=ratio, where=direct != 0)
    return np.where(direct == 0, failed, ratio)


def select_superfiltering(ifd: ArrayLike, k: int, *, threshold: float = 1.0) -> Ids:
    """
    The `k` highest IFD values below the threshold, highest first (hf.co/papers/2402.00530, section 3).

    Args:
        ifd (`array` of shape `(N,)`):
            IFD of every example; NaN is not selectable.
        k (`int`):
            How many ids to return, at most.
        threshold (`float`, *optional*, defaults to `1.0`):
            Examples at or above it are dropped: there the instruction misleads the model.

    Returns:
        `np.ndarray` of int64: at most `k` ids; empty if nothing is below the threshold.
    """
    values = np.asarray(ifd, dtype=np.float64)
    return top_k(np.where(values < threshold, values, np.nan), k)


def select_cherry(ifd: ArrayLike, k: int, *, threshold: float = 1.0) -> Ids:
    """
    The `k` highest IFD values that do not exceed the threshold, in dataset order (hf.co/papers/2308.12032, 2.3).

    Args:
        ifd (`array` of shape `(N,)`):
            IFD of every example; NaN is not selectable.
        k (`int`):
            How many ids to return, at most.
        threshold (`float`, *optional*, defaults to `1.0`):
            Examples above it are dropped.

    Returns:
        `np.ndarray` of int64: at most `k` ids in ascending order.
    """
    values = np.asarray(ifd, dtype=np.float64)
    return np.sort(top_k(np.where(values <= threshold, values, np.nan), k))


def pre_experienced_ids(
    perplexity: ArrayLike, labels: ArrayLike, *, per_cluster: int = 10, low: float = 1.0, high: float = 99.0
) -> Ids:
    """
    Examples of Cherry's brief first training: a few per cluster, evenly strided over a middle band of perplexity.

    See hf.co/papers/2308.12032, section 2.1. A cluster with fewer members than are wanted gives all of them: a band
    would cut most of it away.

    Args:
        perplexity (`array` of shape `(N,)`):
            Perplexity of every example; one whose perplexity is unknown is never chosen.
        labels (`array` of int of shape `(N,)`):
            Cluster of every example, for example k-means with 100 clusters on mean-pooled instruction embeddings.
        per_cluster (`int`, *optional*, defaults to `10`):
            Examples to take from each cluster.
        low (`float`, *optional*, defaults to `1.0`), high (`float`, *optional*, defaults to `99.0`):
            Percentiles of perplexity between which a cluster's members must lie.

    Returns:
        `np.ndarray` of int64: ids in ascending order.

    Raises:
        `ValueError`: if `per_cluster` is not positive or the percentiles are out of order.
    """
    if per_cluster < 1:
        raise ValueError(f"`per_cluster` must be at least 1, got {per_cluster}")
    if not 0 <= low < high <= 100:
        raise ValueError(f"percentiles need 0 <= low < high <= 100, got low={low}, high={high}")
    values, cluster = np.asarray(perplexity, dtype=np.float64), np.asarray(labels)
    chosen = []
    for label in np.unique(cluster):
        members = np.flatnonzero((cluster == label) & np.isfinite(values))
        if len(members) == 0:
            continue
        if len(members) < per_cluster:
            chosen.append(members)
            continue
        bounds = np.percentile(values[members], [low, high])
        members = members[bottom_k(values[members], len(members))]
        inside = members[(values[members] >= bounds[0]) & (values[members] <= bounds[1])]
        inside = inside if len(inside) else members
        stride = np.linspace(0, len(inside), min(per_cluster, len(inside)), endpoint=False).astype(np.int64)
        chosen.append(inside[stride])
    return np.sort(np.concatenate(chosen)).astype(np.int64) if chosen else np.zeros(0, dtype=np.int64)


def _pair(conditioned: ArrayLike, direct: ArrayLike) -> tuple[Floats, Floats]:
    first, second = np.asarray(conditioned, dtype=np.float64), np.asarray(direct, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"the two passes must score the same examples, got shapes {first.shape} and {second.shape}")
    return first, second
