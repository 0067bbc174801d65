"""K-FAC factors of a model's layers, against a Hessian written out."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from dsel_trl.scorers.kfac import Kfac
from dsel_trl.signals.ghost import GhostRecorder
from dsel_trl.signals.ghost_layers import Examples
from tests.signals.test_ghost import gpt2, llama, row_losses, tokens

SHARE = 0.1


def lora():
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    return get_peft_model(llama(), config)


class OneByOne:
    """What a rank goes through of rows of tokens, one at a time, as the gradients of a run do."""

    def __init__(self, model, rank=0, world=1):
        self.recorder, self.model, self.rows = GhostRecorder(model), model, tokens(4)
        self.rank, self.world = rank, world

    def each(self, rows, ids, request):
        own = list(ids[self.rank :: self.world])
        for turn in range(-(-len(ids) // self.world)):
            i = own[turn] if turn < len(own) else ids[0]
            with self.recorder.open([request], Examples(1, 1, self.rows.shape[1])) as (found,):
                row_losses(self.model, self.rows[i : i + 1]).sum().backward()
            if turn < len(own):
                yield np.array([i]), found


def calibrated(model, layers, examples=3, rank=0, world=1):
    gradients = OneByOne(model, rank, world)
    passes = SimpleNamespace(rank=rank, total=lambda values: values)
    run = SimpleNamespace(rows=None, passes=passes, world=world, gradients=gradients)
    found = Kfac(gradients.recorder.layers(layers))
    found.calibrate(run, np.arange(examples), layers)
    return found, gradients


def positions(model, modules, rows):
    """Inputs of the first and output gradients of all modules, side by side, of every position with a gradient."""
    seen = {}
    handles = []
    for name in modules:
        module = model.get_submodule(name)
        handles.append(module.register_forward_hook(lambda m, a, o, n=name: seen.__setitem__(n, (a[0].detach(), o))))
    losses = row_losses(model, rows)
    outputs = [seen[name][1] for name in modules]
    deltas = torch.autograd.grad(losses.sum(), outputs)
    for handle in handles:
        handle.remove()
    # The last position has no loss.
    return seen[modules[0]][0][:, :-1].flatten(0, 1), torch.cat(deltas, -1)[:, :-1].flatten(0, 1)


BLOCK = "model.layers.0.self_attn."
ADAPTED = f"base_model.model.{BLOCK}"


@pytest.mark.parametrize(
    ("make", "modules"),
    [
        (llama, [f"{BLOCK}q_proj", f"{BLOCK}k_proj", f"{BLOCK}v_proj"]),
        (llama, [f"{BLOCK}o_proj"]),
        (gpt2, ["transformer.h.0.attn.c_attn"]),
        (gpt2, ["transformer.h.0.attn.c_proj"]),
        (lora, [f"{ADAPTED}q_proj.lora_A.default", f"{ADAPTED}v_proj.lora_A.default"]),
        (lora, [f"{ADAPTED}v_proj.lora_B.default"]),
    ],
)
@pytest.mark.parametrize("solver", ["exact", "factored"])
def test_the_inverse_hessian_is_that_of_the_factors_written_out(make, modules, solver):
    model = make()
    kfac, gradients = calibrated(model, "attention")
    named = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(1)
    names = gradients.recorder.parameters("attention")
    direction = {name: torch.randn(named[name].shape, generator=generator) for name in names}
    solved = kfac.solve(direction, SHARE, solver)
    assert set(solved) == set(direction)
    across = make is gpt2

    def matrix(values):
        rows = [values[f"{m}.weight"].T if across else values[f"{m}.weight"] for m in modules]
        biases = [values[f"{m}.bias"] for m in modules if f"{m}.bias" in values]
        return torch.cat([torch.cat(rows), torch.cat(biases).unsqueeze(1)], 1) if biases else torch.cat(rows)

    x, delta = (part.double() for part in positions(model, modules, tokens(4)[:3]))
    whole, found = matrix(direction).double(), matrix(solved).double()
    if whole.shape[1] > x.shape[1]:
        x = torch.cat([x, torch.ones(len(x), 1)], 1)
    s_x, s_delta = x.T @ x / len(x), delta.T @ delta / len(x)
    lam = SHARE * s_x.diagonal().mean() * s_delta.diagonal().mean()
    if solver == "exact":
        again = s_delta @ found @ s_x + lam * found
    else:
        share = SHARE**0.5
        one = s_delta + share * s_delta.diagonal().mean() * torch.eye(len(s_delta))
        two = s_x + share * s_x.diagonal().mean() * torch.eye(len(s_x))
        again = one @ found @ two
    torch.testing.assert_close(again, whole, rtol=1e-3, atol=1e-3)


def test_an_example_that_a_rank_repeats_does_not_count():
    found = []
    # With three ids the second of two ranks has run out in the second turn, and goes through another one again.
    for examples in (2, 3):
        kfac, gradients = calibrated(llama(), "attention", examples, rank=1, world=2)
        named = dict(gradients.model.named_parameters())
        direction = {name: torch.ones_like(named[name]) for name in gradients.recorder.parameters("attention")}
        found.append(kfac.solve(direction, SHARE))
    assert all(torch.equal(found[0][name], value) for name, value in found[1].items())


def test_only_linear_layers_have_factors():
    with pytest.raises(ValueError, match=r"'model.embed_tokens' has no factors of the Hessian"):
        Kfac(GhostRecorder(llama()).layers("all"))
