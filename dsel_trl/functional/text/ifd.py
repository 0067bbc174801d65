"""Instruction-following difficulty: how little the instruction helps to predict the answer.

Cherry LLM takes a ratio of mean losses (hf.co/papers/2308.12032), Superfiltering one of perplexities of a small model
(hf.co/papers/2402.00530).
"""

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..ranking import bottom_k

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


def ifd_from_perplexities(ppl_conditioned: ArrayLike, ppl_direct: ArrayLike, *, failed: float = math.nan) -> Floats:
    """
    Superfiltering's IFD: perplexity of the answer given the instruction over its perplexity alone.

    See hf.co/papers/2402.00530, Eq. 2.

    Args:
        ppl_conditioned (`array` of shape `(N,)`):
            Perplexity of the answer given the instruction.
        ppl_direct (`array` of shape `(N,)`):
            Perplexity of the answer alone.
        failed (`float`, *optional*, defaults to `nan`):
            Value where `ppl_direct` is 0, which is how a failed forward is recorded. The published scripts use 0, and
            may then select such an example as the easiest one.

    Returns:
        `np.ndarray` of float64 of shape `(N,)`: NaN where a perplexity is unknown or infinite.

    Raises:
        `ValueError`: if the shapes differ.
    """
    conditioned, direct = _pair(ppl_conditioned, ppl_direct)
    ratio = np.full(direct.shape, np.nan)
    np.divide(conditioned, direct, out=ratio, where=np.isfinite(conditioned) & np.isfinite(direct) & (direct != 0))
    return np.where(direct == 0, failed, ratio)


def drop_misled(ifd: ArrayLike, threshold: float = 1.0, *, at_threshold: bool = False) -> Floats:
    """
    The IFD values as scores, of which those that exceed the threshold are never selected: there the instruction
    misleads the model.

    Args:
        ifd (`array` of shape `(N,)`):
            IFD of every example; NaN is not selectable.
        threshold (`float`, *optional*, defaults to `1.0`):
            Largest value.
        at_threshold (`bool`, *optional*, defaults to `False`):
            Whether a value of exactly the threshold stays, as in Cherry's script (hf.co/papers/2308.12032, 2.3);
            Superfiltering's drops it (hf.co/papers/2402.00530, section 3).

    Returns:
        `np.ndarray` of float64 of shape `(N,)`: `-inf` where the example is dropped.
    """
    values = np.asarray(ifd, dtype=np.float64)
    return np.where(values <= threshold if at_threshold else values < threshold, values, -np.inf)


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
