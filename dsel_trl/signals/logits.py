"""Per-token signals out of logits, and the gate inside a loss that a model computes itself.

Up to TRL 1.14 the models have no fused head. DPO and KTO compute their losses of the model's logits, and the gate sits
on these. SFT's loss is computed inside the model's forward, of all logits at once or in chunks of tokens: there the
cross-entropy is met on its way, and the gate sits before it.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, nll_loss, pad
from torch.overrides import TorchFunctionMode

from ..functional.preference.wpo import log_sum_squared_probs, target_logps, token_entropy
from .batch import Forward
from .gate import Gate, Place

# Tokens whose logits are looked at in float32 at a time.
CHUNK = 1024
Fields = dict[str, Tensor]


def read_logits(logits: Tensor, labels: Tensor, outputs: tuple[str, ...] = ()) -> Forward:
    """
    What the fused head would return: per-token fields of each next label, `(rows, T - 1)`; 0 where it is -100.

    Args:
        logits (`torch.Tensor` of shape `(rows, T, V)`):
            Of a forward; position t is followed by label t + 1.
        labels (`torch.Tensor` of shape `(rows, T)`):
            -100 where there is no loss.
        outputs (`tuple[str, ...]`, *optional*, defaults to `()`):
            Fields of [`Forward`] that are wanted beside `log_probs`.
    """
    targets = labels[:, 1:]
    rows, positions = (targets != -100).nonzero(as_tuple=True)
    parts = [
        _fields(logits[where], targets[where], outputs)
        for where in zip(rows.split(CHUNK), positions.split(CHUNK), strict=True)
    ]
    return _placed(parts, targets)


@torch.no_grad()
def _fields(logits: Tensor, targets: Tensor, outputs: tuple[str, ...]) -> Fields:
    """Fields of some tokens, of their logits `(n, V)` or log-probabilities, which are their own logits."""
    fields = {"log_probs": target_logps(logits.detach(), targets)}
    if "log_sum_sq_probs" in outputs:
        fields["log_sum_sq_probs"] = log_sum_squared_probs(logits.detach())
    if "entropy" in outputs:
        fields["entropy"] = token_entropy(logits.detach())
    if "is_top1" in outputs:
        fields["is_top1"] = logits.argmax(-1) == targets
    return fields


def _placed(parts: list[Fields], targets: Tensor) -> Forward:
    """The fields of all tokens that have a target, in their order, put where these tokens are."""
    valid = targets != -100
    placed: Fields = {"log_probs": torch.zeros(targets.shape, device=targets.device)}
    for name in parts[0] if parts else ():
        values = torch.cat([part[name] for part in parts])
        placed[name] = values.new_zeros(targets.shape)
        placed[name][valid] = values
    return Forward(**placed)


def beside_logits(weights: Tensor) -> Tensor:
    """Weights in the layout of logits, whose last position has no label."""
    return weights if weights.dim() == 1 else pad(weights, (0, 1), value=1.0)


class InnerLoss(TorchFunctionMode):
    """
    Meets the cross-entropies that a model computes inside its forward, reads their tokens and gates them.

    A loss may come in one call or in chunks; it is the rows' own when its targets are their labels, in their order.

    Args:
        labels (`torch.Tensor` of shape `(rows, T)`):
            Labels of the forward.
        gate ([`~dsel_trl.signals.gate.Gate`], *optional*):
            Put before each of them.
        outputs (`tuple[str, ...]`, *optional*, defaults to `()`):
            Fields of [`Forward`] that are wanted beside `log_probs`.
    """

    def __init__(self, labels: Tensor, gate: Gate | None, outputs: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.gate, self.outputs = gate, outputs
        self._targets = labels[:, 1:]
        self._where = (self._targets != -100).nonzero()
        self._labels = self._targets[self._where[:, 0], self._where[:, 1]]
        self._parts: list[Fields] = []
        self._seen = 0
        self._carries_gradient = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (cross_entropy, nll_loss) and len(args) > 1 and (valid := self._own(args[1])) is not None:
            args = (self._met(args[0], args[1], valid), *args[1:])
        return func(*args, **(kwargs or {}))

    def _own(self, targets: Tensor) -> Tensor | None:
        """Which of a loss's targets are the next of the labels; `None` for a loss of something else."""
        if targets.dim() != 1 or targets.is_floating_point():
            return None
        valid = targets != -100
        found = targets[valid]
        return valid if torch.equal(found, self._labels[self._seen : self._seen + len(found)]) else None

    def _met(self, values: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
        own = valid.nonzero().squeeze(1)
        where = self._where[self._seen : self._seen + len(own)]
        self._seen += len(own)
        self._parts.extend(_fields(values.detach()[part], targets[part], self.outputs) for part in own.split(CHUNK))
        self._carries_gradient |= values.requires_grad
        if self.gate is None or not values.requires_grad:
            return values
        return self.gate(values, _at_tokens(valid, where))

    def forward(self) -> tuple[Forward, bool] | None:
        """What was read, and whether it carried gradient; `None` where the loss was not computed inside."""
        if not self._parts or self._seen != len(self._labels):
            return None
        return _placed(self._parts, self._targets), self._carries_gradient


def _at_tokens(valid: Tensor, where: Tensor) -> Place:
    """Brings weights to the tokens of a loss; its other targets have no gradient."""

    def place(weights: Tensor) -> Tensor:
        placed = torch.ones(valid.shape, dtype=weights.dtype, device=valid.device)
        placed[valid] = (weights[where[:, 0]] if weights.dim() == 1 else weights[where[:, 0], where[:, 1]]).to(
            placed.device
        )
        return placed

    return place
