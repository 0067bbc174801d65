"""Which layers of a model have per-example gradients that follow from their inputs and output gradients."""

import fnmatch
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..functional.ghost import Outer, Part, bias_gradients, embedding_gradients, exact, norm_gradients

# A place in a model's stack of blocks: the first number in a module's name.
BLOCK = re.compile(r"(?:^|\.)(\d+)\.")
LAST = re.compile(r"^last-(\d+)$")
# The attention's part of a block, by the names that models give it.
ATTENTION = re.compile(r"(?:^|\.)\w*att(?:n|ention)\w*\.")
CHOICES = "'linear', 'attention', 'lora', 'norms', 'all', 'last-K' or names of modules"
# A parameter's own name in its module, its inputs and output gradients by example, and what they say of it.
Find = Callable[[Any, Tensor, Tensor], dict[str, Part]]


@dataclass(frozen=True)
class Examples:
    """
    Whose the positions of a batch are.

    Attributes:
        size (`int`):
            Examples of the batch.
        rows, length (`int`):
            Rows of the batch and positions of a row. Row r belongs to example `r % size`, as those of pairs do; both
            rows of a pair then stand in one line, for its gradient is their sum.
        lengths (`torch.Tensor` of shape `(size,)`, *optional*):
            Where all examples lie in one row (padding-free): how long each of them is.
    """

    size: int
    rows: int
    length: int
    lengths: Tensor | None = None

    def __post_init__(self) -> None:
        if self.lengths is None and self.rows % self.size:
            raise ValueError(f"{self.rows} rows are not those of {self.size} examples.")

    def by_example(self, values: Tensor, width: int) -> Tensor | None:
        """
        Values of a layer's positions by example, `(size, T, ...)`; `None` where they are not those of this batch.

        Args:
            values (`torch.Tensor` of shape `(rows, T, ...)` or `(rows * T, ...)`):
                What a layer was given or gave.
            width (`int`):
                Dimensions of one position: 1 for vectors, 0 for tokens.
        """
        inner = values.shape[values.dim() - width :] if width else ()
        if values.dim() - width == 1 and values.shape[0] == self.rows * self.length:
            values = values.reshape(self.rows, self.length, *inner)
        if values.dim() <= width or values.shape[0] != self.rows:
            return None
        if self.lengths is not None:
            return self._segments(values, inner) if values.shape[1] == self.length else None
        values = values.reshape(self.rows, -1, *inner)
        if self.rows == self.size:
            return values
        sides = values.reshape(self.rows // self.size, self.size, *values.shape[1:]).transpose(0, 1)
        return sides.reshape(self.size, -1, *inner)

    def _segments(self, values: Tensor, inner: tuple[int, ...]) -> Tensor:
        assert self.lengths is not None
        lengths = self.lengths.tolist()
        pieces = list(values[0, : sum(lengths)].split(lengths))
        return nn.utils.rnn.pad_sequence(pieces, batch_first=True).reshape(self.size, -1, *inner)


@dataclass(frozen=True)
class Layer:
    """
    A module whose parameters' per-example gradients are known.

    Attributes:
        name (`str`): of the module in the model.
        module (`nn.Module`): the module.
        parameters (`dict[str, str]`): its trainable parameters: own name to the name in the model.
        find (`Callable`): gives the parts of its parameters.
    """

    name: str
    module: nn.Module
    parameters: dict[str, str]
    find: Find

    @property
    def linear(self) -> bool:
        """Whether it is `y = W a + b`, trained in its weight."""
        return self.find in (_linear, _conv1d) and "weight" in self.parameters

    @property
    def lies_across(self) -> bool:
        """Whether its weight is `(d_in, d_out)`, not `(d_out, d_in)`."""
        return self.find is _conv1d

    def parts(self, source: Tensor, grad: Tensor, examples: Examples) -> dict[str, Part]:
        """
        Parts of its trainable parameters by their names in the model.

        Raises:
            `ValueError`: if the layer was run on other rows than the batch's.
        """
        a = examples.by_example(source, 0 if isinstance(self.module, nn.Embedding) else 1)
        b = examples.by_example(grad, 1)
        if a is None or b is None:
            raise ValueError(
                f"The layer {self.name!r} was run on {tuple(source.shape)}, which are not the {examples.rows} rows of "
                f"{examples.length} tokens of the batch, so what of it belongs to which example is not known. Leave "
                "it out of `layers`."
            )
        found = self.find(self.module, a, b)
        return {name: found[own] for own, name in self.parameters.items()}


def _linear(module: Any, a: Tensor, b: Tensor) -> dict[str, Part]:
    return {"weight": Outer(a, b), **_bias(module, b)}


def _conv1d(module: Any, a: Tensor, b: Tensor) -> dict[str, Part]:
    # Its weight lies the other way round.
    return {"weight": Outer(b, a), **_bias(module, b)}


def _bias(module: Any, b: Tensor) -> dict[str, Part]:
    return {} if module.bias is None else {"bias": bias_gradients(b)}


def _embedding(module: Any, a: Tensor, b: Tensor) -> dict[str, Part]:
    return {"weight": embedding_gradients(a, b, module.num_embeddings, module.padding_idx)}


def _layer_norm(module: Any, a: Tensor, b: Tensor) -> dict[str, Part]:
    return {"weight": norm_gradients(a, b, module.eps, centred=True), "bias": bias_gradients(b)}


def _rms_norm(module: Any, a: Tensor, b: Tensor) -> dict[str, Part]:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if eps is None:
        eps = torch.finfo(exact(a).dtype).eps
    return {"weight": norm_gradients(a, b, eps, centred=False)}


def finder(module: nn.Module) -> Find | None:
    """What knows the per-example gradients of a module's own parameters; `None` for a kind that is not known."""
    if isinstance(module, nn.Linear):
        return _linear
    if isinstance(module, nn.Embedding):
        return None if module.scale_grad_by_freq or module.sparse or module.max_norm else _embedding
    if isinstance(module, nn.LayerNorm):
        return _layer_norm if len(module.normalized_shape) == 1 else None
    name, weight = type(module).__name__, getattr(module, "weight", None)
    if name == "Conv1D" and isinstance(weight, Tensor):
        return _conv1d
    if name.endswith("RMSNorm") and isinstance(weight, Tensor) and weight.dim() == 1:
        return _rms_norm
    return None


def find_layers(model: nn.Module) -> list[Layer]:
    """
    All layers of a model whose trainable parameters have per-example gradients that are known.

    Raises:
        `ValueError`: for DoRA and its like, whose updates are no sums of outer products.
    """
    names = {id(value): name for name, value in model.named_parameters() if value.requires_grad}
    found = []
    for name, module in model.named_modules():
        if variants := getattr(module, "lora_variant", None):
            kinds = sorted({type(variant).__name__ for variant in variants.values()})
            raise ValueError(
                f"{name!r} is adapted by {kinds}: only plain LoRA (rank-stabilised too) has per-example gradients "
                "that follow from its layers. Set use_dora=False."
            )
        own = {key: names[id(value)] for key, value in module.named_parameters(recurse=False) if id(value) in names}
        find = finder(module) if own else None
        if find is not None:
            found.append(Layer(name, module, own, find))
    return found


def choose_layers(model: nn.Module, spec: str | Sequence[str]) -> list[Layer]:
    """
    The layers that `spec` names, with all that share a parameter with one of them.

    Args:
        model (`nn.Module`):
            The policy.
        spec (`str` or `Sequence[str]`):
            `"linear"`: all linear layers (LoRA's among them) but the head; `"lora"`: LoRA's only; `"last-K"`: the
            linear layers of the last K blocks; `"attention"`: those inside of the attention; `"norms"`: the LayerNorms
            and RMSNorms; `"all"`: every trainable parameter, head, embeddings and norms too; or names of modules:
            whole (`"model.layers.0.mlp.up_proj"`), the end of one (`"up_proj"`, `"norm"`), or with wildcards
            (`"*.layers.[01].*"`).

    Raises:
        `ValueError`: for a name that matches no layer, or a parameter (of `"all"`) that no known layer has.
    """
    layers = find_layers(model)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    linear = [layer for layer in layers if layer.find in (_linear, _conv1d) and layer.module is not head]
    words = [spec] if isinstance(spec, str) else list(spec)
    chosen: dict[str, Layer] = {}
    for word in words:
        match = _matching(word, layers, linear)
        if not match:
            raise ValueError(_nothing(word, layers))
        chosen.update({layer.name: layer for layer in match})
    if "all" in words:
        covered = {name for layer in layers for name in layer.parameters.values()}
        trained = [name for name, value in model.named_parameters() if value.requires_grad]
        if missing := [name for name in trained if name not in covered]:
            raise ValueError(
                f"layers='all' needs per-example gradients of {missing[:5]}, which belong to no layer of a known kind "
                "(linear, Conv1D, embedding, LayerNorm, RMSNorm, LoRA). Name the layers that are wanted."
            )
    shared = {name for layer in chosen.values() for name in layer.parameters.values()}
    return [layer for layer in layers if layer.name in chosen or shared & set(layer.parameters.values())]


def _matching(word: str, layers: list[Layer], linear: list[Layer]) -> list[Layer]:
    if word == "all":
        return layers
    if word == "linear":
        return linear
    if word == "attention":
        return [layer for layer in linear if ATTENTION.search(layer.name)]
    if word == "lora":
        return [layer for layer in linear if re.search(r"\.lora_[AB]\.", layer.name)]
    if word == "norms":
        return [layer for layer in layers if layer.find in (_layer_norm, _rms_norm)]
    if last := LAST.match(word):
        numbered = [(int(found[1]), layer) for layer in linear if (found := BLOCK.search(layer.name))]
        first = max((number for number, _ in numbered), default=0) + 1 - int(last[1])
        return [layer for number, layer in numbered if number >= first] if int(last[1]) else []
    ends = f".{word}"
    return [
        layer
        for layer in layers
        # Inside of what LoRA adapts its two matrices carry the name of the adapted module.
        if f".{layer.name}".endswith(ends) or fnmatch.fnmatch(layer.name, word) or f"{ends}.lora_" in f".{layer.name}"
    ]


def _nothing(word: str, layers: list[Layer]) -> str:
    known = sorted({layer.name.rsplit(".", 1)[-1] for layer in layers})
    return (
        f"layers={word!r} matches no layer with trainable parameters: give {CHOICES}. Their names end in {known}, "
        f"such as {layers[0].name!r}."
        if layers
        else f"layers={word!r} matches nothing: the model has no trainable layer of a known kind."
    )
