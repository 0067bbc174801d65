"""Oracle adapter for products of per-example gradients: the recorder on layers with the oracle's own numbers."""

import torch
from torch import nn

from dsel_trl.signals.ghost import GhostRecorder, GradientRequest
from dsel_trl.signals.ghost_layers import Examples


def tensor(values):
    values = torch.tensor(values)
    return values.double() if values.is_floating_point() else values


class OracleRMSNorm(nn.Module):
    """What a model calls an RMSNorm."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)


class LowRank(nn.Module):
    """A frozen layer and its two trained factors, as PEFT has them."""

    def __init__(self, params, scale):
        super().__init__()
        self.base = nn.Linear(len(params["W"][0]), len(params["W"]), bias=False)
        self.A = nn.Linear(len(params["A"][0]), len(params["A"]), bias=False)
        self.B = nn.Linear(len(params["B"][0]), len(params["B"]), bias=False)
        self.scale = scale
        self.base.weight.requires_grad_(False)

    def forward(self, x):
        return self.base(x) + self.B(self.A(x)) * self.scale


def build(kind, inputs):
    """The module, and its parameters by the oracle's names."""
    params = inputs["params"]
    if kind == "lora":
        module = LowRank(params, inputs["lora_scale"])
        names = {"A": "A.weight", "B": "B.weight", "W": "base.weight"}
    else:
        size, names = len(params["weight"]), {name: name for name in params}
        if kind.startswith("linear"):
            module = nn.Linear(len(params["weight"][0]), size, bias="bias" in params)
        elif kind == "embedding":
            module = nn.Embedding(size, len(params["weight"][0]), inputs.get("padding_idx"))
        elif kind == "layernorm":
            module = nn.LayerNorm(size, eps=inputs["eps"])
        elif kind == "rmsnorm":
            module = OracleRMSNorm(size, inputs["eps"])
        else:
            raise ValueError(f"No layer of kind {kind!r} is known.")
    module.double()
    own = dict(module.named_parameters())
    with torch.no_grad():
        for name, values in params.items():
            own[names[name]].copy_(tensor(values))
    return module, names


def record(module, x, output_grad, size, layers="all", **wanted):
    recorder = GhostRecorder(module)
    x = x.requires_grad_() if x.is_floating_point() else x
    with recorder.open([GradientRequest(layers, **wanted)], Examples(size, *x.shape[:2])) as (found,):
        (module(x) * output_grad).sum().backward()
    return found


def evaluate(oracle):
    for i, case in enumerate(oracle["cases"]):
        inputs, expected = case["inputs"], case["expected"]
        module, names = build(case["kind"], inputs)
        x, output_grad, train = tensor(inputs["x"]), tensor(inputs["output_grad"]), inputs["n_train"]
        for route in ("pairs", "gradients", "auto"):
            label = f"cases[{i}].{case['kind']}.{route}"
            found = record(module, x, output_grad, len(x), gram=True, norms=True, route=route)
            if "gram_all_rows" in expected:
                yield f"{label}.gram_all_rows", found.gram, expected["gram_all_rows"]
            if "dot_train_val" in expected:
                yield f"{label}.dot_train_val", found.gram[:train, train:], expected["dot_train_val"]
            if "norm" in expected:
                yield f"{label}.norm", found.norms, expected["norm"]
        trained = {name: own for name, own in names.items() if dict(module.named_parameters())[own].requires_grad}
        written = {}
        for name, own in trained.items():
            seen = {}

            def keep(key, gradients, seen=seen):
                seen[key] = gradients
                return gradients.new_zeros(len(gradients), 1)

            record(module, x, output_grad, len(x), features=keep)
            written[own] = seen[own]
            products = seen[own].flatten(1) @ seen[own].flatten(1).T
            if wanted := expected.get("per_parameter", {}).get(name):
                label = f"cases[{i}].{case['kind']}.{name}"
                yield f"{label}.dot_train_val", products[:train, train:], wanted["dot_train_val"]
                yield f"{label}.sq_norm", products.diagonal(), wanted["sq_norm"]
        if "dot_with_val_mean" in expected:
            direction = {own: values[train:].mean(dim=0) for own, values in written.items()}
            found = record(module, x, output_grad, len(x), directions={"mean": direction})
            yield (
                f"cases[{i}].{case['kind']}.dot_with_val_mean",
                found.dot("mean")[:train],
                expected["dot_with_val_mean"],
            )
