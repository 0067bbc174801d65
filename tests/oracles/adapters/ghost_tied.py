"""Oracle adapter for a head that is tied to the embeddings: the recorder on the oracle's own model."""

import torch
from torch import nn

from dsel_trl.signals.ghost import GhostRecorder, GradientRequest
from dsel_trl.signals.ghost_layers import Examples
from tests.oracles.adapters.ghost import tensor


class Tied(nn.Module):
    def __init__(self, params):
        super().__init__()
        weight = tensor(params["emb.weight"])
        self.emb = nn.Embedding(*weight.shape)
        self.lin = nn.Linear(weight.shape[1], weight.shape[1])
        self.head = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.head.weight = self.emb.weight
        self.double()
        with torch.no_grad():
            for name, values in params.items():
                self.get_parameter(name).copy_(tensor(values))

    def forward(self, ids):
        return self.head(torch.tanh(self.lin(self.emb(ids))))


def evaluate(oracle):
    for i, case in enumerate(oracle["cases"]):
        model, ids = Tied(case["inputs"]["params"]), tensor(case["inputs"]["ids"])
        wanted = {"gram_total": "all", "gram_tied_weight": "emb"}
        for route in ("pairs", "gradients"):
            requests = [GradientRequest(layers, gram=True, norms=True, route=route) for layers in wanted.values()]
            recorder = GhostRecorder(model)
            with recorder.open(requests, Examples(len(ids), *ids.shape)) as found:
                losses = nn.functional.cross_entropy(
                    model(ids)[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none"
                ).mean(dim=1)
                losses.sum().backward()
            for name, one in zip(wanted, found, strict=True):
                yield f"cases[{i}].{route}.{name}", one.gram, case["expected"][name]
            yield f"cases[{i}].{route}.norm", found[0].norms, case["expected"]["norm"]
