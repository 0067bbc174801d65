"""What a causal language model says of single responses: token statistics, and hidden states of several layers."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..core.costs import Costs
from ..core.data_passes import Passes
from ..core.evaluation import evaluation_mode
from ..data.tokens import IGNORED, padded
from ..functional.audit.token_statistics import NAMES, response_statistics, token_values

# Depths at which hidden states are read, as shares of the layers.
DEPTHS = (0.4, 2 / 3, 1.0)
# Wider states are projected to so many numbers, always by the same random matrix.
WIDEST = 1024
# Logits of a batch: 400 MB in float32.
MOST_LOGITS = 10**8
# Tokens of which all is worked out at once.
PART = 1024


class ResponseReader:
    """
    Reads responses behind their prompts, and again without them, through a model as it is.

    Args:
        model:
            A causal language model. It is put into evaluation mode for each batch, and back.
        start (`Sequence[int]`):
            What stands before a response without its prompt: at least one token.
        depths (`Sequence[float]`, *optional*):
            Depths of the hidden states, in (0, 1]; none for statistics alone.
        autocast (`torch.dtype`, *optional*):
            Precision of the forwards, where it is not that of the model.
        costs ([`~dsel_trl.core.costs.Costs`], *optional*):
            Where the forwards are counted as `what`.
        what (`str`, *optional*, defaults to `"scorer_forwards"`):
            Name of the counter.

    Memory: a batch of the model, and the logits of [`batch_tokens`] tokens.
    """

    def __init__(
        self,
        model: Any,
        start: Sequence[int],
        *,
        depths: Sequence[float] = DEPTHS,
        autocast: torch.dtype | None = None,
        costs: Costs | None = None,
        what: str = "scorer_forwards",
    ) -> None:
        config = model.config.get_text_config()
        self.model, self.start, self.autocast = model, list(start), autocast
        self.costs, self.what = costs, what
        self.layers = sorted({max(1, round(depth * config.num_hidden_layers)) for depth in depths})
        self._blocks: Sequence[nn.Module] = list(_blocks(model, config.num_hidden_layers)) if self.layers else []
        self.vocabulary, hidden = int(config.vocab_size), int(config.hidden_size)
        self.width = min(hidden, WIDEST)
        self._projection: Tensor | None = None
        if hidden > WIDEST:
            generator = torch.Generator().manual_seed(0)
            self._projection = torch.randn(hidden, WIDEST, generator=generator) / WIDEST**0.5

    @property
    def batch_tokens(self) -> int:
        """Padded tokens of a batch, so that its logits stay small."""
        return max(512, min(8192, MOST_LOGITS // self.vocabulary))

    def split(self, values: np.ndarray) -> tuple[np.ndarray, dict[int, np.ndarray]]:
        """Rows of `forward` as statistics `(n, len(NAMES))` and pooled states `(n, width)` by layer."""
        states = np.split(values[:, len(NAMES) :], len(self.layers), axis=1) if self.layers else []
        return values[:, : len(NAMES)], dict(zip(self.layers, states, strict=True))

    @torch.no_grad()
    def forward(self, inputs: dict[str, Any], ids: Tensor) -> Tensor:
        """`(B, len(NAMES) + layers * width)` float32 of padded rows with `labels` on their responses."""
        labels = inputs["labels"]
        answers = [row[row != IGNORED].tolist() for row in labels[:, 1:]]
        alone = padded(
            [(self.start + answer, [IGNORED] * len(self.start) + answer) for answer in answers], 0, labels.device
        )
        with evaluation_mode(self.model):
            given, states = self._read(inputs, bool(self.layers))
            bare, _ = self._read(alone, False)
        scored = labels != IGNORED
        count = scored.sum(1, keepdim=True)
        found = [response_statistics(given, bare[0], scored[:, 1:].sum(1))]
        for layer in states:
            # Of a response without a token nothing is known: 0 / 0.
            pooled = torch.einsum("bt,bth->bh", scored.float(), layer.float()) / count
            found.append(pooled if self._projection is None else pooled @ self._projection.to(layer.device))
        return torch.cat(found, dim=1)

    def _read(self, inputs: dict[str, Any], states: bool) -> tuple[Tensor, list[Tensor]]:
        """
        Values `(4, B, T)` of each row's labelled tokens, from place 0 on, and the hidden states `(B, width, hidden)`
        of the layers.
        """
        ids, mask, labels = inputs["input_ids"], inputs["attention_mask"], inputs["labels"]
        autocast = torch.autocast(ids.device.type, dtype=self.autocast, enabled=self.autocast is not None)
        with autocast, _outputs([self._blocks[layer - 1] for layer in self.layers] if states else []) as seen:
            output = self.model(input_ids=ids, attention_mask=mask, use_cache=False, return_dict=True)
        if self.costs is not None:
            self.costs.ran(self.what, len(ids), int(mask.sum()))
        scored = labels[:, 1:] != IGNORED
        row, place = torch.nonzero(scored, as_tuple=True)
        counted = scored.cumsum(1) - 1
        values = torch.zeros((4, *scored.shape), device=ids.device)
        # In parts, for each makes several more of the size of its logits.
        for rows, places in zip(row.split(PART), place.split(PART), strict=True):
            own = token_values(output.logits[rows, places], labels[rows, places + 1])
            values[:, rows, counted[rows, places]] = own
        return values[:, :, : max(1, int(scored.sum(1).max()))], seen


@contextmanager
def _outputs(blocks: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """
    What each block gives, in their order. Hooks of our own, for those behind `output_hidden_states` stay on a model
    for good.
    """
    seen: list[Tensor] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handles = [block.register_forward_hook(note) for block in blocks]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _blocks(model: nn.Module, count: int) -> nn.ModuleList:
    """
    The layers of a language model: of its module lists, the first of that length.

    Raises:
        `ValueError`: if there is none.
    """
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ValueError(
        f"No list of {count} layers is found in a {type(model).__name__}: its hidden states cannot be read. Leave "
        "`states` out of the signals."
    )


def read_responses(
    reader: ResponseReader,
    rows: Any,
    ids: np.ndarray,
    lengths: np.ndarray,
    *,
    passes: Passes,
    pad: int,
    device: Any,
    description: str,
) -> np.ndarray:
    """
    What `reader` says of the responses `ids`, `(len(ids), K)` float32, in batches of like length.

    Args:
        reader ([`ResponseReader`]):
            The model.
        rows:
            `rows[ids]` gives a list of (tokens, labels), as [`~dsel_trl.data.tokens.Sequences`] does.
        ids (`np.ndarray`):
            Which.
        lengths (`np.ndarray`):
            Tokens of all rows.
        passes ([`~dsel_trl.core.data_passes.Passes`]):
            Cuts the batches and shows a progress bar.
        pad (`int`), device, description (`str`):
            Padding token, where the model is, and the text of the bar.
    """
    return passes.measure(
        lambda values: values,
        ids,
        inputs=lambda chosen: padded(rows[chosen], pad, device),
        lengths=lengths,
        forward=reader.forward,
        tokens=reader.batch_tokens,
        description=description,
    )
