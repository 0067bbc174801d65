"""A method that asks for everything that can be had of the examples' gradients, and checks it against each alone."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from dsel_trl import Method
from dsel_trl.signals.ghost import GradientRequest

RELATIVE = 1e-5


def full(gradient):
    return {name: v.full_tensor() if isinstance(v, DTensor) else v for name, v in gradient.items()}


def whole(gradient):
    return torch.cat([value.flatten() for value in full(gradient).values()])


def worst(found, expected):
    """Largest difference, as a share of the largest value."""
    return float((found - expected).abs().max() / expected.abs().max())


@dataclass
class AsksForAll(Method):
    """
    Compares, in every step, what was recorded with a backward pass of each example alone.

    `known` says which examples must have values: all of them, or those whose weight is one number and not 0.
    """

    layers: object = "linear"
    unknown: tuple = ()
    checked: int = field(default=0, init=False)
    apart: dict = field(default_factory=dict, init=False)

    name = "asks_for_all"
    trainers = ("dpo", "sft")

    def gradients(self, run):
        self.direction = {
            name: torch.randn_like(value, dtype=torch.float32) * 0.1
            for name, value in run.gradients.parameters(self.layers).items()
        }
        if run.world > 1:
            # Random numbers of one's own would be another direction on each rank.
            self.direction = run.gradients.of(run.rows, np.arange(3), layers=self.layers, mean=False)
        self.sum, self.of_step = None, None
        return GradientRequest(
            self.layers,
            directions={"v": self.direction},
            norms=True,
            gram=True,
            features=lambda name, values: values.flatten(1)[:, :3].tanh(),
            keep=True,
        )

    def after_backward(self, run, batch, gradients):
        ids, own = batch.gather(batch.ids)
        # All ranks take part in each of them.
        each = [full(run.gradients.of(run.rows, np.array([i]), layers=self.layers)) for i in ids.tolist()]
        alone = torch.stack([whole(gradient) for gradient in each])
        mine = alone[own]
        features = torch.zeros(len(mine), 3)
        for name in each[0]:
            features += torch.stack([gradient[name] for gradient in each[own]]).flatten(1)[:, :3].tanh()
        known = torch.tensor([i not in self.unknown for i in batch.ids.tolist()])
        pairs = {
            "dot": (gradients.dot("v"), mine @ whole(self.direction)),
            "against": (gradients.against(self.direction), mine @ whole(self.direction)),
            "norms": (gradients.norms, mine.norm(dim=1)),
            "features": (gradients.features, features),
        }
        for name, (found, expected) in pairs.items():
            assert torch.isnan(found[~known]).all(), name
            if known.any():
                self._note(name, found[known], expected[known])
        square = known[:, None] & known
        assert torch.isnan(gradients.gram[~square]).all()
        if known.any():
            self._note("gram", gradients.gram[square], (mine @ mine.T)[square])
        # What the step is made of: each example's share of its own gradient.
        shares, _ = batch.gather(gradients.shares)
        part = shares @ alone
        self.sum = part if self.sum is None else self.sum + part
        self.of_step = run.gradients.of_step(self.layers)
        self.checked += len(mine)
        return {}

    def _note(self, name, found, expected):
        self.apart[name] = max(self.apart.get(name, 0.0), worst(found, expected))
        assert self.apart[name] <= RELATIVE, (name, found, expected)

    def observe(self, run, step):
        if not self.unknown and "weight" not in step.values:
            self._note("step", whole(self.of_step), self.sum)
