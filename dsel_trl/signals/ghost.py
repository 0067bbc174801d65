"""
Products of per-example gradients during the ordinary backward pass.

An identity is put behind each layer that is asked for; on the way back it meets the gradient of the layer's output and
the layer's input, which autograd keeps anyway, and works out there what a method wants. Nothing is run twice, and
gradient checkpointing keeps what it saves: the input comes out of the recomputed forward.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..functional.ghost import (
    MEMORY,
    Part,
    count,
    cut,
    dot,
    joined,
    parameter_gradients,
    parameter_gram,
    parameter_square_norms,
    pieces,
)
from .ghost_layers import Examples, Layer, choose_layers

# A gradient, or what stands in its place, by the names of the parameters.
Direction = Mapping[str, Tensor]


@dataclass(frozen=True)
class GradientRequest:
    """
    What a method wants of the gradients of a batch's examples; nothing else is worked out.

    Attributes:
        layers (`str` or `Sequence[str]`):
            Which layers, as [`~dsel_trl.signals.ghost_layers.choose_layers`] takes them.
        directions (`Mapping[str, Direction]`, *optional*):
            By name: what each example's gradient is multiplied with, a tensor (or DTensor) for each parameter of the
            layers. One more matmul per layer and direction; nothing is kept.
        norms (`bool`, *optional*, defaults to `False`):
            The norm of each example's gradient.
        gram (`bool`, *optional*, defaults to `False`):
            The products of all examples of the micro-batch with each other.
        features (`Callable[[str, torch.Tensor], torch.Tensor]`, *optional*):
            Makes features `(n, K)` of a parameter's gradients `(n, *shape)`, given its name and gradients (of some
            examples at a time); those of all parameters are added up. The gradients are those of the examples' own
            losses, so that it may do what is not linear, as Adam does.
        visit (`Callable[[str, torch.Tensor, torch.Tensor, torch.Tensor], None]`, *optional*):
            Is shown each call of a layer: its name, inputs `(B, T, d_in)`, output gradients `(B, T, d_out)` and the
            factor of each example, `(B,)`, that makes the latter those of its own loss (K-FAC factors).
        keep (`bool`, *optional*, defaults to `False`):
            Whether [`ExampleGradients.against`] is wanted later: holds inputs and output gradients of the layers, as
            much memory as their activations, until the step is done.
        route (`str`, *optional*, defaults to `"auto"`), memory (`int`, *optional*, defaults to 512 MiB):
            How pairs and norms are worked out, and with how many bytes beside the result: see
            [`~dsel_trl.functional.ghost.gram`].
    """

    layers: str | Sequence[str] = "linear"
    directions: Mapping[str, Direction] = field(default_factory=dict)
    norms: bool = False
    gram: bool = False
    features: Callable[[str, Tensor], Tensor] | None = None
    visit: Callable[[str, Tensor, Tensor, Tensor], None] | None = None
    keep: bool = False
    route: str = "auto"
    memory: int = MEMORY

    @property
    def whole(self) -> bool:
        """Whether anything needs all uses of a parameter at once."""
        return self.norms or self.gram or self.features is not None


class ExampleGradients:
    """
    What was asked of the gradients of one micro-batch's examples.

    The gradient of an example is that of its own loss (a pair's loss, the mean over an example's trained tokens),
    whatever mean, accumulation or weight the trainer has put on it. Where that is not known (an example of weight 0,
    or weights per token) values are NaN.

    Attributes:
        shares (`torch.Tensor` of shape `(B,)`):
            Coefficient of each example's gradient in the gradient of the optimizer step, its weight left out: over
            all ranks and micro-batches the step's gradient is the sum of `shares * weight * gradient`.
    """

    def __init__(self, request: GradientRequest, size: int, scale: Tensor, shares: Tensor) -> None:
        self.request, self.size, self.scale, self.shares = request, size, scale, shares
        self._dots: dict[str, Tensor] = {}
        self._squares: Tensor | None = None
        self._gram: Tensor | None = None
        self._features: Tensor | None = None
        self._kept: list[tuple[str, Part]] = []

    def dot(self, name: str) -> Tensor:
        """Product of each example's gradient with the direction `name` of the request, `(B,)`."""
        return self._dots[name] * self.scale

    @property
    def norms(self) -> Tensor:
        """Norm of each example's gradient, `(B,)`."""
        assert self._squares is not None, "The request does not say norms=True."
        return self._squares.clamp(min=0).sqrt() * self.scale.abs()

    @property
    def gram(self) -> Tensor:
        """Products of all examples of the micro-batch, `(B, B)`."""
        assert self._gram is not None, "The request does not say gram=True."
        return self._gram * self.scale.unsqueeze(1) * self.scale

    @property
    def features(self) -> Tensor:
        """Features of each example's gradient, `(B, K)`."""
        assert self._features is not None, "The request gives no features."
        return self._features

    def against(self, direction: Direction) -> Tensor:
        """Product of each example's gradient with a direction that is known only now, `(B,)` (`keep=True`)."""
        assert self.request.keep, "The request does not say keep=True."
        total = torch.zeros_like(self.scale)
        for name, part in self._kept:
            total = total + dot(part, _whole(direction[name]))
        return total * self.scale

    def free(self) -> None:
        """Lets go of what was kept."""
        self._kept = []

    def met(self, parts: Mapping[str, Part]) -> None:
        """One call of a layer has met its gradient: what is linear in it."""
        for name, direction in self.request.directions.items():
            for parameter, part in parts.items():
                found = dot(part, _whole(direction[parameter]))
                self._dots[name] = self._dots[name] + found if name in self._dots else found
        if self.request.keep:
            self._kept += [(parameter, part) for parameter, part in parts.items()]

    def done(self, parameter: str, parts: Sequence[Part]) -> None:
        """All uses of a parameter have met their gradients: what takes all of them at once."""
        request, parts = self.request, joined(parts)
        how = {"route": request.route, "memory": request.memory}
        if request.gram:
            found = parameter_gram(parts, parts, **how)  # type: ignore[arg-type]
            self._gram = found if self._gram is None else self._gram + found
        if request.norms and not request.gram:
            found = parameter_square_norms(parts, **how)  # type: ignore[arg-type]
            self._squares = found if self._squares is None else self._squares + found
        elif request.norms:
            assert self._gram is not None
            self._squares = self._gram.diagonal()
        if request.features is not None:
            found = self._made(request.features, parameter, parts)
            self._features = found if self._features is None else self._features + found

    def _made(self, features: Callable[[str, Tensor], Tensor], parameter: str, parts: Sequence[Part]) -> Tensor:
        one = parameter_gradients([cut(part, 0, 1) for part in parts])
        rows = []
        for start, end in pieces(count(parts[0]), 4 * one.numel(), self.request.memory):
            written = parameter_gradients([cut(part, start, end) for part in parts])
            scale = self.scale[start:end].view(-1, *[1] * (written.dim() - 1))
            rows.append(features(parameter, written * scale))
        return torch.cat(rows)


def _whole(values: Tensor) -> Tensor:
    return values.full_tensor() if isinstance(values, DTensor) else values


class _Meeting(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, source: Tensor, recorder: "GhostRecorder", layer: Layer) -> Tensor:
        ctx.recorder, ctx.layer = recorder, layer
        ctx.save_for_backward(source)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = grads
        (source,) = ctx.saved_tensors
        device = grad.device.type
        # The products are in full precision wherever the backward pass is not; to say so takes as long as a product of
        # a small layer, so it is said where it is needed.
        exactly = torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
        with torch.no_grad(), exactly:
            ctx.recorder.meet(ctx.layer, source, grad)
        return grad, None, None, None


class GhostRecorder:
    """
    Listens to the layers of a model while it is open, and works out what is asked of the examples' gradients.

    It records forwards that carry gradient: not those of a reference model in the same modules, nor of evaluations.

    Args:
        model (`nn.Module`):
            The policy, unwrapped.

    Example:

    ```python
    >>> recorder = GhostRecorder(model)
    >>> with recorder.open([GradientRequest(norms=True)], Examples(size=4, rows=4, length=16)) as (found,):
    ...     model(input_ids).logits.logsumexp(-1).mean(1).sum().backward()
    >>> found.norms
    ```
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._found: list[ExampleGradients] = []
        self._examples = Examples(1, 1, 1)
        self._wanted: list[set[str]] = []
        self._layers: dict[str, Layer] = {}
        self._handles: list[Any] = []
        # Calls of a layer that carry gradient and have not met it yet, and those that have.
        self._pending: Counter[str] = Counter()
        self._met: Counter[str] = Counter()
        # Uses of each parameter, by module, and what they have given so far.
        self._users: dict[str, set[str]] = {}
        self._parts: dict[str, list[Part]] = {}
        self._complete: set[str] = set()
        self._backward = False
        self._chosen: dict[Any, list[Layer]] = {}

    def layers(self, spec: str | Sequence[str]) -> list[Layer]:
        """The layers that a request names; `ValueError` where it names none."""
        key = spec if isinstance(spec, str) else tuple(spec)
        if key not in self._chosen:
            self._chosen[key] = choose_layers(self.model, spec)
        return self._chosen[key]

    def parameters(self, spec: str | Sequence[str]) -> list[str]:
        """Names of the parameters of the layers that a request names."""
        return list(dict.fromkeys(name for layer in self.layers(spec) for name in layer.parameters.values()))

    @contextmanager
    def open(self, requests: Iterable[GradientRequest], examples: Examples) -> Iterator[list[ExampleGradients]]:
        """Listens in the `with` block, in which forward and backward of a batch are run."""
        try:
            yield self.listen(requests, examples)
            self.check()
        finally:
            self.close()

    def listen(self, requests: Iterable[GradientRequest], examples: Examples) -> list[ExampleGradients]:
        """Begins to listen; the results are complete when the backward pass is done (then `check`, then `close`)."""
        self.close()
        self._examples = examples
        device = next(self.model.parameters()).device
        one = torch.ones(examples.size, device=device)
        for request in requests:
            layers = self.layers(request.layers)
            self._found.append(ExampleGradients(request, examples.size, one, one))
            self._wanted.append({layer.name for layer in layers})
            for layer in layers:
                self._layers[layer.name] = layer
                if request.whole:
                    for name in layer.parameters.values():
                        self._users.setdefault(name, set()).add(layer.name)
        for layer in self._layers.values():
            self._handles.append(layer.module.register_forward_hook(self._hook(layer), with_kwargs=True))
        return self._found

    def scaled(self, scale: Tensor, shares: Tensor) -> None:
        """
        Said between forward and backward.

        Args:
            scale (`torch.Tensor` of shape `(B,)`):
                What makes an example's part of the gradient that of its own loss; NaN where nothing does.
            shares (`torch.Tensor` of shape `(B,)`):
                See [`ExampleGradients`].
        """
        for found in self._found:
            found.scale, found.shares = scale, shares
        self.forward_done()

    def forward_done(self) -> None:
        """Said between forward and backward, where `scaled` is not: a checkpoint's forwards follow, run again."""
        self._backward = True

    def _hook(self, layer: Layer) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
            if not torch.is_grad_enabled() or not output.requires_grad:
                return None
            # A checkpoint's forward that is run again to have its activations was counted when it was first run,
            # unless it then ran without gradient.
            if not self._backward or not self._pending[layer.name]:
                self._pending[layer.name] += 1
            (source,) = args or kwargs.values()
            return _Meeting.apply(output, source.detach(), self, layer)

        return hook

    def meet(self, layer: Layer, source: Tensor, grad: Tensor) -> None:
        """A layer's input and the gradient of its output."""
        self._backward = True
        self._pending[layer.name] -= 1
        self._met[layer.name] += 1
        parts = layer.parts(source, grad, self._examples)
        for found, wanted in zip(self._found, self._wanted, strict=True):
            if layer.name in wanted:
                found.met(parts)
                if found.request.visit is not None:
                    a = self._examples.by_example(source, int(source.is_floating_point()))
                    b = self._examples.by_example(grad, 1)
                    assert a is not None
                    assert b is not None
                    found.request.visit(layer.name, a, b, found.scale)
        for name, part in parts.items():
            if name in self._users:
                self._collect(name, part)

    def _collect(self, name: str, part: Part) -> None:
        """One more part of a parameter; when all are there, what takes all of them at once is worked out."""
        if name in self._complete:
            raise ValueError(
                f"{name!r} met another gradient after all of them seemed to be there: with a layer that is used in "
                "several checkpoints set gradient_checkpointing_kwargs={'use_reentrant': False}."
            )
        self._parts.setdefault(name, []).append(part)
        if any(self._pending[user] or not self._met[user] for user in self._users[name]):
            return
        self._complete.add(name)
        parts = self._parts.pop(name)
        for found, wanted in zip(self._found, self._wanted, strict=True):
            if found.request.whole and self._users[name] & wanted:
                found.done(name, parts)

    def check(self) -> None:
        """
        After the backward pass: every layer must have met its gradient.

        Raises:
            `ValueError`: naming those that have not.
        """
        if missing := [name for name in self._layers if not self._met[name] or self._pending[name] > 0]:
            raise ValueError(
                f"The layers {missing[:5]} were not run in the training forward, or no gradient came back to them, so "
                "what the examples' gradients say of them is not known. A fused head (TRL's own) is not run as a "
                "layer, so that neither the head nor embeddings tied to it can be asked for; a layer that a batch "
                "does not use (an expert) cannot either. Leave them out of `layers`."
            )

    def close(self) -> None:
        """Stops listening."""
        for handle in self._handles:
            handle.remove()
        self._found, self._wanted, self._handles, self._layers = [], [], [], {}
        self._users, self._parts, self._complete = {}, {}, set()
        self._pending, self._met, self._backward = Counter(), Counter(), False
