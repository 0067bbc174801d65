"""Random projections of gradients: inner products are kept, memory is not needed for the matrix."""

import hashlib

import torch
from torch import Tensor

BLOCK = 2**16


def stream_of(seed: int, *name: object) -> int:
    """A seed in [0, 2**63) of its own for everything that is named."""
    content = repr((int(seed), *name)).encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") >> 1


def signs(rows: int, columns: int, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """
    A matrix of random signs, `(rows, columns)` float32: 1 and -1, the same on every device.

    Args:
        rows, columns (`int`): its shape.
        seed (`int`): another one, other signs.
        device (`torch.device`, *optional*, defaults to the CPU): where it is needed.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(2, (rows, columns), generator=generator, dtype=torch.int8)
    return drawn.to(device).float().mul_(2).sub_(1)


def rademacher(vectors: Tensor, size: int, seed: int, block: int = BLOCK) -> Tensor:
    """
    Projects vectors by random signs, `(n, size)`: inner products are right on average, to about `sqrt(2 / size)`.

    The matrix is drawn anew in blocks of rows, so that it is never held as a whole.

    Args:
        vectors (`torch.Tensor` of shape `(n, P)`):
            What is projected.
        size (`int`):
            Numbers that are left of each.
        seed (`int`):
            The same seed for all that is to be compared.
        block (`int`, *optional*, defaults to `65536`):
            Rows drawn at a time; part of what the signs hang on.

    Returns:
        `torch.Tensor` of shape `(n, size)`, float32, divided by `sqrt(size)`.
    """
    total = vectors.new_zeros(len(vectors), size, dtype=torch.float32)
    for number, start in enumerate(range(0, vectors.shape[1], block)):
        part = vectors[:, start : start + block].float()
        total += part @ signs(part.shape[1], size, stream_of(seed, number), vectors.device)
    return total.div_(size**0.5)


def factored(matrices: Tensor, size: int, seed: int) -> Tensor:
    """
    Projects matrices from both sides by random signs, `(n, size)`: far cheaper than the projection of all entries.

    Args:
        matrices (`torch.Tensor` of shape `(n, d_out, d_in)`):
            What is projected, such as gradients of a weight.
        size (`int`):
            Numbers that are left of each: a square.
        seed (`int`):
            The same seed for all that is to be compared.

    Returns:
        `torch.Tensor` of shape `(n, size)`, float32: inner products are right on average.

    Raises:
        `ValueError`: if `size` is no square.
    """
    side = round(size**0.5)
    if side * side != size:
        raise ValueError(f"size={size} is no square: {side * side} is the nearest one")
    left = signs(matrices.shape[1], side, stream_of(seed, "out"), matrices.device)
    right = signs(matrices.shape[2], side, stream_of(seed, "in"), matrices.device)
    projected: Tensor = left.T @ matrices.float() @ right
    return projected.flatten(1).div_(side)


def projected(gradients: Tensor, size: int, seed: int, kind: str = "factored") -> Tensor:
    """
    Projects the gradients of one parameter, `(n, size)` float32.

    Args:
        gradients (`torch.Tensor` of shape `(n, *shape)`):
            Those of n examples.
        size (`int`):
            Numbers that are left of each; with `"factored"` a square.
        seed (`int`):
            The same seed for all that is to be compared.
        kind (`str`, *optional*, defaults to `"factored"`):
            `"factored"`: matrices by [`factored`], all else by [`rademacher`]; `"rademacher"`: everything by it.
    """
    if kind == "factored" and gradients.dim() == 3:
        return factored(gradients, size, seed)
    return rademacher(gradients.flatten(1), size, seed)
