"""Quad: influence on a reference set through K-FAC factors of the Hessian (https://hf.co/papers/2409.16986)."""

import torch
from torch import Tensor

from ..ghost import exact

# Below the damping that any gradient of numbers in float32 leads to, and above what they cannot be divided by.
LEAST = 1e-30


def kfac_sums(x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor, int]:
    """
    Sums of `x x^T` `(d_in, d_in)` and `delta delta^T` `(d_out, d_out)` over positions, and the number of positions.

    Divided by that number they are the factors `S_x` and `S_delta`. Positions without any gradient, such as padding,
    are left out.

    Args:
        x (`torch.Tensor` of shape `(B, T, d_in)`):
            Inputs of a layer.
        delta (`torch.Tensor` of shape `(B, T, d_out)`):
            Gradients of the examples' losses by its outputs.
    """
    x, delta = exact(x).flatten(0, -2), exact(delta).flatten(0, -2)
    seen = (delta != 0).any(dim=-1)
    x, delta = x[seen], delta[seen]
    return x.T @ x, delta.T @ delta, len(x)


def damping(s_x: Tensor, s_delta: Tensor, share: float = 0.1) -> float:
    """`share` of the mean eigenvalue of the Hessian `S_delta (x) S_x`; positive even where that is 0."""
    return max(share * float(s_x.diagonal().mean()) * float(s_delta.diagonal().mean()), LEAST)


def ihvp(gradient: Tensor, s_x: Tensor, s_delta: Tensor, lam: float) -> Tensor:
    """
    `(S_delta (x) S_x + lam I)^-1` times a matrix gradient, by the factors' eigenvectors: exact damping.

    Args:
        gradient (`torch.Tensor` of shape `(d_out, d_in)`):
            What is multiplied.
        s_x (`torch.Tensor` of shape `(d_in, d_in)`), s_delta (`torch.Tensor` of shape `(d_out, d_out)`):
            Symmetric factors, of any rank.
        lam (`float`):
            Damping, positive.

    Raises:
        `ValueError`: if `lam` is not positive.
    """
    _check(lam)
    (values_x, q_x), (values_d, q_d) = torch.linalg.eigh(exact(s_x)), torch.linalg.eigh(exact(s_delta))
    curvature = values_d.clamp(min=0).unsqueeze(1) * values_x.clamp(min=0) + lam
    rotated: Tensor = q_d @ ((q_d.T @ exact(gradient) @ q_x) / curvature) @ q_x.T
    return rotated


def factored_ihvp(gradient: Tensor, s_x: Tensor, s_delta: Tensor, lam: float, pi: float = 1.0) -> Tensor:
    """
    `(S_delta + sqrt(lam) / pi I)^-1 gradient (S_x + sqrt(lam) pi I)^-1`: damping of each factor, by two solutions.

    Cheaper than [`ihvp`], and a stronger damping: the cross terms count too. Arguments as there.

    Raises:
        `ValueError`: if `lam` is not positive.
    """
    _check(lam)
    s_x, s_delta, root = exact(s_x), exact(s_delta), lam**0.5
    left = s_delta + root / pi * torch.eye(len(s_delta), dtype=s_delta.dtype, device=s_delta.device)
    right = s_x + root * pi * torch.eye(len(s_x), dtype=s_x.dtype, device=s_x.device)
    solved: Tensor = torch.linalg.solve(right, torch.linalg.solve(left, exact(gradient)).T).T
    return solved


def balance(s_x: Tensor, s_delta: Tensor) -> float:
    """
    The `pi` that damps both factors by the same share of their mean eigenvalues: `sqrt(mean(S_x) / mean(S_delta))`.
    """
    mean_x, mean_d = float(s_x.diagonal().mean()), float(s_delta.diagonal().mean())
    return (mean_x / mean_d) ** 0.5 if mean_x > 0 and mean_d > 0 else 1.0


def _check(lam: float) -> None:
    if not lam > 0:
        raise ValueError(f"lam={lam!r}: the damping must be positive.")
