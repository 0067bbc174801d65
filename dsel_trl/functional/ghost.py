"""
Products of per-example gradients out of a layer's inputs and output gradients, without a second backward pass.

The gradient that one example gives a parameter is held as a *part*: [`Outer`] for a weight matrix, [`Lookup`] for an
embedding table, [`Whole`] for what is small enough to be written out (biases, norms). A parameter that is used in
several places (a tied head, a layer called twice) has several parts, and its gradient is their sum; cross terms are
part of every product. All sums are in float32 or better, whatever the precision of the parts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Bytes that a product may need beside its result.
MEMORY = 512 * 2**20
ROUTES = ("auto", "pairs", "gradients")
# Whether this torch multiplies bfloat16 into float32: from 2.8 on, with CUDA; a build for ROCm has the name alone.
WIDENS = torch.version.cuda is not None and hasattr(torch.ops.aten.mm, "dtype")


def exact(values: Tensor) -> Tensor:
    """The values in float32, or in float64 if they are."""
    return values if values.dtype == torch.float64 else values.float()


@dataclass(frozen=True)
class Outer:
    """
    Gradients `sum_t b[i, t] a[i, t]^T` of a weight `(d_out, d_in)`: `y = W a`.

    Attributes:
        a (`torch.Tensor` of shape `(n, T, d_in)`): inputs of the layer.
        b (`torch.Tensor` of shape `(n, T, d_out)`): gradients of the examples' losses by its outputs.
    """

    a: Tensor
    b: Tensor


@dataclass(frozen=True)
class Lookup:
    """
    Gradients of a table `(size, d)` of which rows are looked up: `b[i, t]` is added to row `tokens[i, t]`.

    Attributes:
        tokens (`torch.Tensor` of shape `(n, T)`, int64): rows that were looked up.
        b (`torch.Tensor` of shape `(n, T, d)`): gradients by what was found.
        size (`int`): rows of the table.
    """

    tokens: Tensor
    b: Tensor
    size: int


@dataclass(frozen=True)
class Whole:
    """
    Gradients as they are.

    Attributes:
        values (`torch.Tensor` of shape `(n, *parameter.shape)`): one gradient per example.
    """

    values: Tensor


Part = Outer | Lookup | Whole


def count(part: Part) -> int:
    """Examples of a part."""
    return (part.values if isinstance(part, Whole) else part.b).shape[0]


def cut(part: Part, start: int, end: int) -> Part:
    """The examples `start` to `end` of a part."""
    if isinstance(part, Outer):
        return Outer(part.a[start:end], part.b[start:end])
    if isinstance(part, Lookup):
        return Lookup(part.tokens[start:end], part.b[start:end], part.size)
    return Whole(part.values[start:end])


# ---- The parts of a layer ----


def bias_gradients(b: Tensor) -> Whole:
    """Gradients of a bias, of output gradients `(n, T, d)`."""
    return Whole(exact(b).sum(dim=1))


def normalized(x: Tensor, eps: float, centred: bool) -> Tensor:
    """
    What a norm layer multiplies by its weight, `(..., d)`, of its inputs.

    Args:
        x (`torch.Tensor` of shape `(..., d)`): inputs.
        eps (`float`): the layer's.
        centred (`bool`): `True` for a LayerNorm (biased variance), `False` for an RMSNorm (mean square), whether its
            weight is `w` or `1 + w`.
    """
    x = exact(x)
    if centred:
        x = x - x.mean(dim=-1, keepdim=True)
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)


def norm_gradients(x: Tensor, b: Tensor, eps: float, centred: bool) -> Whole:
    """Gradients of a norm layer's weight, of its inputs and output gradients `(n, T, d)`; arguments as above."""
    return Whole((exact(b) * normalized(x, eps, centred)).sum(dim=1))


def embedding_gradients(tokens: Tensor, b: Tensor, size: int, padding_idx: int | None = None) -> Lookup:
    """Gradients of an embedding table of `size` rows; that of its padding token is always 0."""
    if padding_idx is not None:
        b = b.masked_fill((tokens == padding_idx).unsqueeze(-1), 0.0)
    return Lookup(tokens, b, size)


# ---- Products of one parameter ----


def dot(part: Part, direction: Tensor) -> Tensor:
    """
    Product of each example's gradient with one matrix, `(n,)`: exact, at the cost of one matmul of the layer.

    Args:
        part ([`Outer`], [`Lookup`] or [`Whole`]): the gradients.
        direction (`torch.Tensor` of the parameter's shape): what they are multiplied with.
    """
    direction = exact(direction)
    if isinstance(part, Whole):
        return exact(part.values).flatten(1) @ direction.flatten()
    if isinstance(part, Lookup):
        return (exact(part.b) * direction[part.tokens]).sum(dim=(1, 2))
    # Through the narrower side: of LoRA's matrices nothing as wide as the layer is written.
    if part.a.shape[-1] <= part.b.shape[-1]:
        return (_times(part.b, direction) * exact(part.a)).sum(dim=(1, 2))
    return (_times(part.a, direction.T) * exact(part.b)).sum(dim=(1, 2))


def _times(values: Tensor, matrix: Tensor) -> Tensor:
    """`values @ matrix` in float32 of values in any precision."""
    if not (WIDENS and values.is_cuda and values.dtype == torch.bfloat16):
        return exact(values) @ matrix
    # Tensor cores multiply what is in bfloat16 and add up in float32: the matrix is rounded as the values are.
    flat = torch.mm(values.flatten(0, -2), matrix.to(values.dtype), out_dtype=torch.float32)
    return flat.view(*values.shape[:-1], -1)


def gradients(part: Part) -> Tensor:
    """Each example's gradient written out, `(n, *parameter.shape)`."""
    if isinstance(part, Whole):
        return exact(part.values)
    b = exact(part.b)
    if isinstance(part, Outer):
        return b.transpose(1, 2) @ exact(part.a)
    written = b.new_zeros(b.shape[0], part.size, b.shape[2])
    return written.scatter_add_(1, part.tokens.unsqueeze(-1).expand_as(b), b)


def pieces(n: int, bytes_each: int, memory: int = MEMORY) -> Iterator[tuple[int, int]]:
    """Start and end of consecutive pieces of `n` things, as many at a time as fit into `memory`, at least one."""
    size = max(1, memory // max(1, bytes_each))
    return ((start, min(n, start + size)) for start in range(0, n, size))


def written_is_cheaper(first: Outer, second: Outer | None = None) -> bool:
    """
    Whether products are cheaper with the gradients written out than from pairs of positions, by multiplications.

    `second` is what `first` is multiplied with, all with all; without it each with itself.
    """
    (n, length, d_in), d_out = first.a.shape, first.b.shape[2]
    if second is None:
        return length * d_in * d_out <= length * length * (d_in + d_out)
    m, other = second.a.shape[:2]
    written = (n * length + m * other + n * m) * d_in * d_out
    return written <= n * m * length * other * (d_in + d_out)


def _written(route: str, first: Outer, second: Outer | None = None) -> bool:
    if route not in ROUTES:
        raise ValueError(f"route={route!r} is none of {list(ROUTES)}.")
    return written_is_cheaper(first, second) if route == "auto" else route == "gradients"


def gram(first: Part, second: Part, route: str = "auto", memory: int = MEMORY) -> Tensor:
    """
    Products of all gradients of one part with all of another of the same parameter, `(n, m)`.

    Args:
        first, second ([`Outer`], [`Lookup`] or [`Whole`]): the gradients.
        route (`str`, *optional*, defaults to `"auto"`): for weight matrices, `"pairs"` multiplies positions
            (`n m T^2 (d_in + d_out)` multiplications), `"gradients"` writes the gradients out
            (`((n + m) T + n m) d_in d_out`), `"auto"` takes the cheaper one.
        memory (`int`, *optional*, defaults to 512 MiB): bytes that may be needed beside the result, in pieces of it.
    """
    if isinstance(first, Outer) and isinstance(second, Outer):
        if _written(route, first, second):
            return _gram_written(first, second, memory)
        return _gram_pairs(first, second, memory)
    if isinstance(first, Whole) or isinstance(second, Whole):
        return gradients(first).flatten(1) @ gradients(second).flatten(1).T
    if isinstance(first, Outer):
        return gram(second, first, route, memory).T
    n, length = first.tokens.shape
    m, other = second.b.shape[:2]
    each = 3 * 4 * length * m * other
    rows = [_gram_lookup(cut(first, *piece), second) for piece in pieces(n, each, memory)]
    return torch.cat(rows)


def _gram_written(first: Outer, second: Outer, memory: int) -> Tensor:
    total = first.b.new_zeros(len(first.a), len(second.a), dtype=exact(first.b).dtype)
    each = 4 * (len(first.a) + len(second.a)) * first.a.shape[2]
    for start, end in pieces(first.b.shape[2], each, memory):
        left = gradients(Outer(first.a, first.b[:, :, start:end])).flatten(1)
        right = left if second is first else gradients(Outer(second.a, second.b[:, :, start:end])).flatten(1)
        total += left @ right.T
    return total


def _gram_pairs(first: Outer, second: Outer, memory: int) -> Tensor:
    m, other = second.a.shape[:2]
    each = 2 * 4 * first.a.shape[1] * m * other
    a, b = exact(second.a).flatten(0, 1), exact(second.b).flatten(0, 1)
    rows = []
    for start, end in pieces(len(first.a), each, memory):
        products = exact(first.a[start:end]) @ a.T
        products *= exact(first.b[start:end]) @ b.T
        rows.append(products.sum(dim=1).view(-1, m, other).sum(dim=2))
    return torch.cat(rows)


def _gram_lookup(first: Part, second: Part) -> Tensor:
    """Products of looked-up rows with those of another lookup, or with a head's weight (the tied cross term)."""
    assert isinstance(first, Lookup)
    (n, length), b = first.tokens.shape, exact(first.b)
    if isinstance(second, Lookup):
        same = first.tokens.view(n, length, 1, 1) == second.tokens
        return ((b @ exact(second.b).flatten(0, 1).T).view(*same.shape) * same).sum(dim=(1, 3))
    assert isinstance(second, Outer)
    m, other = second.a.shape[:2]
    met = (b @ exact(second.a).flatten(0, 1).T).view(n, length, m, other)
    # The head's output gradient at each token that was looked up.
    found = exact(second.b)[:, :, first.tokens].permute(2, 3, 0, 1)
    return (met * found).sum(dim=(1, 3))


def square_norms(part: Part, route: str = "auto", memory: int = MEMORY) -> Tensor:
    """Squared norm of each gradient of a part, `(n,)`; arguments as of [`gram`], without its pairs of examples."""
    if isinstance(part, Whole):
        return exact(part.values).flatten(1).square().sum(dim=1)
    if isinstance(part, Lookup):
        each = 3 * 4 * part.tokens.shape[1] ** 2
        parts = [cut(part, *piece) for piece in pieces(count(part), each, memory)]
        return torch.cat([_lookup_norms(piece) for piece in parts])
    n, length, d_in = part.a.shape
    if _written(route, part):
        total = part.b.new_zeros(n, dtype=exact(part.b).dtype)
        for start, end in pieces(part.b.shape[2], 4 * n * d_in, memory):
            total += gradients(Outer(part.a, part.b[:, :, start:end])).square().sum(dim=(1, 2))
        return total
    found = []
    for start, end in pieces(n, 2 * 4 * length**2, memory):
        a, b = exact(part.a[start:end]), exact(part.b[start:end])
        found.append(((a @ a.transpose(1, 2)) * (b @ b.transpose(1, 2))).sum(dim=(1, 2)))
    return torch.cat(found)


def _lookup_norms(part: Part) -> Tensor:
    assert isinstance(part, Lookup)
    same, b = part.tokens.unsqueeze(2) == part.tokens.unsqueeze(1), exact(part.b)
    return ((b @ b.transpose(1, 2)) * same).sum(dim=(1, 2))


# ---- Products of a parameter with several parts ----


def joined(parts: Sequence[Part]) -> list[Part]:
    """
    As few parts as have the same sum: positions of further uses stand behind those of the first.

    A layer that is called twice in one forward has the products of one that is called once with twice the positions.
    """
    outers = [part for part in parts if isinstance(part, Outer)]
    lookups = [part for part in parts if isinstance(part, Lookup)]
    wholes = [part for part in parts if isinstance(part, Whole)]
    found: list[Part] = []
    if outers:
        found.append(Outer(torch.cat([p.a for p in outers], 1), torch.cat([p.b for p in outers], 1)))
    if lookups:
        tokens, b = torch.cat([p.tokens for p in lookups], 1), torch.cat([p.b for p in lookups], 1)
        found.append(Lookup(tokens, b, lookups[0].size))
    if wholes:
        found.append(Whole(torch.stack([exact(p.values) for p in wholes]).sum(dim=0)))
    return list(parts) if len(found) == len(parts) else found


def parameter_gram(parts: Sequence[Part], others: Sequence[Part], route: str = "auto", memory: int = MEMORY) -> Tensor:
    """Products of all gradients with all others, `(n, m)`, of a parameter with several parts: cross terms included."""
    if parts is not others:
        return torch.stack([gram(one, two, route, memory) for one in parts for two in others]).sum(dim=0)
    total = torch.stack([gram(part, part, route, memory) for part in parts]).sum(dim=0)
    for i, one in enumerate(parts):
        for two in parts[i + 1 :]:
            cross = gram(one, two, route, memory)
            total = total + cross + cross.T
    return total


def parameter_square_norms(parts: Sequence[Part], route: str = "auto", memory: int = MEMORY) -> Tensor:
    """Squared norm of each example's gradient, `(n,)`, of a parameter with several parts: cross terms included."""
    total = torch.stack([square_norms(part, route, memory) for part in parts]).sum(dim=0)
    for i, one in enumerate(parts):
        for two in parts[i + 1 :]:
            pairs = [gram(cut(one, k, k + 1), cut(two, k, k + 1), route, memory)[0, 0] for k in range(count(one))]
            total = total + 2 * torch.stack(pairs)
    return total


def parameter_gradients(parts: Sequence[Part]) -> Tensor:
    """Each example's gradient written out, `(n, *parameter.shape)`, of a parameter with several parts."""
    total = gradients(parts[0])
    for part in parts[1:]:
        total = total + gradients(part)
    return total
