"""Optimal transport between two sets of vectors: potentials by Sinkhorn's iteration in blocks, or exactly."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]

METRICS = ("cosine", "sqeuclidean", "euclidean")
# Numbers of the cost matrix that are in memory at once.
BLOCK = 2**24
# A regularisation that is lowered by halves needs no exact answer on the way.
ROUGH = 0.1
ROUGH_ITERATIONS = 20


class Transport(NamedTuple):
    """
    A transport plan between `N` sources and `M` targets, by its dual potentials.

    Attributes:
        f (`Floats` of shape `(N,)`): potentials of the sources, of mean 0.
        g (`Floats` of shape `(M,)`): potentials of the targets.
        cost (`float`): what the plan costs, `<C, P>`.
        error (`float`): largest relative error of a target's mass; the sources' masses are exact.
        iterations (`int`): iterations made.
    """

    f: Floats
    g: Floats
    cost: float
    error: float
    iterations: int


class _Costs:
    """The cost matrix of two sets, computed block of rows by block of rows."""

    def __init__(self, sources: Tensor, targets: Tensor, metric: str) -> None:
        if metric not in METRICS:
            raise ValueError(f"metric={metric!r} is none of {list(METRICS)}.")
        for name, rows in (("sources", sources), ("targets", targets)):
            if rows.dim() != 2 or not len(rows):
                raise ValueError(f"`{name}` has shape {tuple(rows.shape)}, but rows of vectors are needed.")
        if sources.shape[1] != targets.shape[1]:
            raise ValueError(f"Sources have {sources.shape[1]} numbers each, targets {targets.shape[1]}.")
        self.sources, self.metric = sources, metric
        self.targets = _unit(targets) if metric == "cosine" else targets
        self.squares = self.targets.square().sum(dim=1)
        self.rows = max(1, BLOCK // len(targets))

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, len(self.sources), self.rows):
            part = slice(start, min(start + self.rows, len(self.sources)))
            yield part, self.block(self.sources[part])

    def block(self, rows: Tensor) -> Tensor:
        rows = _unit(rows) if self.metric == "cosine" else rows
        costs = torch.addmm(self.squares, rows, self.targets.T, alpha=-2)
        costs.add_(rows.square().sum(dim=1, keepdim=True)).clamp_(min=0)
        return costs.sqrt_() if self.metric == "euclidean" else costs


def _unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows, dim=1, eps=1e-12)


def cost_matrix(sources: Tensor, targets: Tensor, metric: str = "cosine") -> Tensor:
    """
    Cost of moving each source to each target, `(N, M)`.

    Args:
        sources, targets (`Tensor` of shape `(N, d)` and `(M, d)`):
            Vectors.
        metric (`str`, *optional*, defaults to `"cosine"`):
            `"sqeuclidean"`, `"euclidean"`, or `"cosine"`: the squared distance of the directions, `2 - 2 cos`.

    Raises:
        `ValueError`: for an unknown metric, an empty set, or vectors of different lengths.
    """
    return _Costs(sources, targets, metric).block(sources)


def sinkhorn(
    sources: Tensor,
    targets: Tensor,
    *,
    metric: str = "cosine",
    eps: float | None = None,
    smooth: float = 0.05,
    tolerance: float = 1e-3,
    max_iterations: int = 2000,
    anneal: bool = True,
) -> Transport:
    """
    Entropic optimal transport between two sets of equal masses, in the log domain (hf.co/papers/1306.0895).

    The plan is `P_ij = exp((f_i + g_j - C_ij) / eps) / (N M)`. An iteration goes through the cost matrix once, in
    blocks of rows that are computed as they are needed: `f` follows from `g`, and the masses that then arrive at the
    targets correct `g`.

    Args:
        sources, targets (`Tensor` of shape `(N, d)` and `(M, d)`, float32 or float64):
            Vectors, all finite; the work is done in their type and on their device, the potentials in float64.
        metric (`str`, *optional*, defaults to `"cosine"`):
            See [`cost_matrix`].
        eps (`float`, *optional*):
            Regularisation, in units of the cost. Defaults to `smooth` times the mean cost.
        smooth (`float`, *optional*, defaults to `0.05`):
            See `eps`.
        tolerance (`float`, *optional*, defaults to `1e-3`):
            Largest relative error of a target's mass at which the iteration ends.
        max_iterations (`int`, *optional*, defaults to `2000`):
            Most iterations, those on the way to `eps` included.
        anneal (`bool`, *optional*, defaults to `True`):
            Whether to begin with the mean cost for `eps` and to halve it: fewer iterations in all.

    Time: `O(N M d)` per iteration; memory: the vectors and 0.2 GB, whatever `N` and `M` are.

    Raises:
        `ValueError`: for an unknown metric, an empty set, vectors of different lengths or numbers out of range.
    """
    costs = _Costs(sources, targets, metric)
    mean = sum(float(block.sum(dtype=torch.float64)) for _, block in costs) / (len(sources) * len(targets))
    eps = max(smooth * mean, torch.finfo(sources.dtype).tiny) if eps is None else eps
    if not eps > 0 or not math.isfinite(eps):
        raise ValueError(f"eps={eps!r} is not a positive number.")
    if max_iterations < 1:
        raise ValueError(f"max_iterations={max_iterations!r} is not positive.")
    g = torch.zeros(len(targets), dtype=torch.float64, device=sources.device)
    stages = [mean * 0.5**k for k in range(64) if mean * 0.5**k > eps] if anneal else []
    iterations, error = 0, math.inf
    for value, enough, most in [*((stage, ROUGH, ROUGH_ITERATIONS) for stage in stages), (eps, tolerance, None)]:
        left = max_iterations - iterations
        for _ in range(left if most is None else min(most, left)):
            arrived = _arrived(costs, g, value)
            iterations += 1
            error = float((arrived * len(targets) - 1).abs().max())
            if error <= enough:
                break
            # Nothing may have arrived at a far target: its potential then grows by a large step.
            tiny = torch.finfo(sources.dtype).tiny
            g -= value * (arrived.clamp(min=tiny) * len(targets)).log()
    f, paid = potentials(sources, targets, g, metric=metric, eps=eps)
    shift = float(f.mean())
    return Transport((f - shift).cpu().numpy(), (g + shift).cpu().numpy(), paid, error, iterations)


def _arrived(costs: _Costs, g: Tensor, eps: float) -> Tensor:
    """Mass that arrives at each target when every source keeps its own, `(M,)` float64."""
    total = torch.zeros_like(g)
    scaled = (g / eps).to(costs.sources.dtype)
    for _, block in costs:
        shares = torch.softmax(block.mul_(-1 / eps).add_(scaled), dim=1)
        total += shares.sum(dim=0, dtype=torch.float64)
    return total / len(costs.sources)


def potentials(
    sources: Tensor, targets: Tensor, g: Tensor, *, metric: str = "cosine", eps: float
) -> tuple[Tensor, float]:
    """
    The potentials of any sources that follow from those of the targets, `(N,)` float64, and what their plan costs.

    Sources that were not there when `g` was found get theirs so too, in `O(M)` each.

    Args:
        sources, targets (`Tensor` of shape `(N, d)` and `(M, d)`):
            Vectors.
        g (`Tensor` of shape `(M,)`):
            Potentials of the targets.
        metric, eps:
            As in [`sinkhorn`].
    """
    costs = _Costs(sources, targets, metric)
    f = torch.empty(len(sources), dtype=torch.float64, device=sources.device)
    scaled, paid = (g / eps).to(sources.dtype), 0.0
    for part, block in costs:
        exponents = scaled - block / eps
        f[part] = -eps * (torch.logsumexp(exponents, dim=1).double() - math.log(len(targets)))
        paid += float((torch.softmax(exponents, dim=1) * block).sum(dtype=torch.float64))
    return f, paid / len(sources)


def exact_transport(sources: Tensor, targets: Tensor, *, metric: str = "cosine") -> Transport:
    """
    Optimal transport between two small sets of equal masses, by a network simplex (POT).

    Potentials are unique, up to a constant, only where no part of the sources weighs as much as a part of the targets;
    equal sources need not get equal ones.

    Args:
        sources, targets (`Tensor` of shape `(N, d)` and `(M, d)`):
            Vectors.
        metric (`str`, *optional*, defaults to `"cosine"`):
            See [`cost_matrix`].

    Time: about `O((N + M)^3)`; memory: `O(N M)`.

    Raises:
        `ImportError`: without POT.
        `ValueError`: as in [`cost_matrix`].
    """
    require_exact()
    import ot

    costs = cost_matrix(sources.double(), targets.double(), metric).cpu().numpy()
    masses = [np.full(size, 1.0 / size) for size in costs.shape]
    plan, log = ot.emd(*masses, costs, log=True, numItermax=10_000_000)
    shift = float(log["u"].mean())
    return Transport(log["u"] - shift, log["v"] + shift, float((plan * costs).sum()), 0.0, 0)


def require_exact() -> None:
    """Raises `ImportError` where POT is not installed."""
    try:
        import ot  # noqa: F401
    except ImportError as error:
        raise ImportError("solver='exact' needs POT: pip install \"dsel-trl[ot]\"") from error
