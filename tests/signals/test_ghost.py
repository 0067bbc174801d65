"""Products of per-example gradients, against a backward pass of each example alone."""

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.pytorch_utils import Conv1D

from dsel_trl.signals.ghost import GhostRecorder, GradientRequest
from dsel_trl.signals.ghost_layers import Examples, choose_layers, find_layers

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = {**SIZES, "vocab_size": 23, "num_key_value_heads": 1, "max_position_embeddings": 32, "initializer_range": 0.2}


def llama(tied=False):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=tied, attention_bias=True, pad_token_id=0))


def qwen3():
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**LLAMA, head_dim=8, tie_word_embeddings=True))


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=23, n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.2)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    return GPT2LMHeadModel(config)


def tokens(rows, length=7, seed=3):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 23, (rows, length), generator=generator)
    # Of each kind one that comes again: in a row, and a row that comes twice.
    ids[:, 3] = ids[:, 1]
    ids[-1] = ids[0]
    return ids


def row_losses(model, ids):
    logits = model(input_ids=ids).logits
    return nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none").mean(dim=1)


def alone(model, names, losses):
    """Each example's gradient by the names of the parameters, from a backward pass of its own loss."""
    parameters = dict(model.named_parameters())
    found = [torch.autograd.grad(loss, [parameters[n] for n in names], retain_graph=True) for loss in losses]
    return {name: torch.stack([each[i] for each in found]) for i, name in enumerate(names)}


def flat(gradients):
    return torch.cat([values.flatten(1) for values in gradients.values()], dim=1)


def assert_close(found, expected, tolerance=1e-5):
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def assert_all(model, ids, layers, route="auto", pairs=False, memory=2**29):
    """Every product of every kind equals that of the gradients written out."""
    size = len(ids) // (2 if pairs else 1)
    recorder = GhostRecorder(model)
    names = recorder.parameters(layers)
    generator = torch.Generator().manual_seed(7)
    parameters = dict(model.named_parameters())
    direction = {name: torch.randn(parameters[name].shape, generator=generator) for name in names}
    sketch = {name: torch.randn(parameters[name].numel(), 5, generator=generator) for name in names}
    request = GradientRequest(
        layers,
        directions={"v": direction},
        norms=True,
        gram=True,
        features=lambda name, values: values.flatten(1).tanh() @ sketch[name],
        keep=True,
        route=route,
        memory=memory,
    )
    rows = row_losses(model, ids)
    losses = rows.view(2, size).sum(0) if pairs else rows
    expected = alone(model, names, losses)
    with recorder.open([request, GradientRequest(layers, norms=True)], Examples(size, *ids.shape)) as (found, norms):
        # Back-propagated is a weighted mean, as in a trainer: each example's own factor is taken out again.
        weights = torch.linspace(0.5, 2.0, size)
        rows = row_losses(model, ids)
        losses = rows.view(2, size).sum(0) if pairs else rows
        recorder.scaled(1 / weights, weights)
        (losses * weights).sum().backward()
    whole = flat(expected)
    assert_close(found.dot("v"), whole @ flat({n: v.unsqueeze(0) for n, v in direction.items()})[0])
    assert_close(found.against(direction), found.dot("v"))
    assert_close(found.gram, whole @ whole.T)
    assert_close(found.norms, whole.norm(dim=1))
    assert_close(norms.norms, whole.norm(dim=1))
    assert_close(found.features, sum(expected[n].flatten(1).tanh() @ sketch[n] for n in names))


@pytest.mark.parametrize("route", ["pairs", "gradients", "auto"])
@pytest.mark.parametrize("make", [llama, lambda: llama(tied=True), qwen3], ids=["untied", "tied", "qwen3"])
def test_every_parameter_of_a_model(make, route):
    assert_all(make(), tokens(4), "all", route)


def test_conv1d_and_layer_norm():
    assert_all(gpt2(), tokens(4), ["*.h.*", "ln_f", "wte"])


def test_what_all_rows_share_is_an_error():
    model, ids = gpt2(), tokens(4)
    with (
        pytest.raises(ValueError, match=r"'transformer.wpe' was run on \(1, 7\)"),
        GhostRecorder(model).open([GradientRequest("wpe", norms=True)], Examples(4, *ids.shape)),
    ):
        row_losses(model, ids).sum().backward()


@pytest.mark.parametrize("route", ["pairs", "gradients"])
def test_in_small_pieces(route):
    assert_all(llama(tied=True), tokens(4), "all", route, memory=1)


def test_pairs_have_two_rows():
    assert_all(llama(tied=True), tokens(6), "all", pairs=True)


@pytest.mark.parametrize("layers", ["linear", "last-1", ["up_proj", "norm"], ["*layers.0.self_attn*"], "embed_tokens"])
def test_chosen_layers(layers):
    assert_all(llama(), tokens(3), layers)


def test_what_is_chosen():
    model = llama()
    names = {layer.name for layer in choose_layers(model, "linear")}
    assert "lm_head" not in names
    assert len(names) == 14
    assert {layer.name for layer in choose_layers(model, "last-1")} == {n for n in names if ".layers.1." in n}
    norms = {layer.name for layer in choose_layers(model, "norms")}
    assert len(norms) == 5
    assert all("norm" in name for name in norms)
    assert {n.name for n in choose_layers(llama(tied=True), "embed_tokens")} == {"model.embed_tokens", "lm_head"}
    with pytest.raises(ValueError, match="'up_prj' matches no layer"):
        choose_layers(model, ["down_proj", "up_prj"])
    with pytest.raises(ValueError, match="'lora' matches no layer"):
        choose_layers(model, "lora")
    model.odd = nn.Bilinear(2, 2, 2)
    with pytest.raises(ValueError, match=r"odd\.weight"):
        choose_layers(model, "all")


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_checkpointing(reentrant):
    model = llama().train()
    model.config.use_cache = False
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    ids, recorder = tokens(3), GhostRecorder(model)
    with recorder.open([GradientRequest(gram=True)], Examples(3, *ids.shape)) as (found,):
        losses = row_losses(model, ids)
        recorder.scaled(torch.ones(3), torch.ones(3))
        losses.sum().backward()
    plain = llama()
    expected = flat(alone(plain, recorder.parameters("linear"), row_losses(plain, ids)))
    assert_close(found.gram, expected @ expected.T)


class Twice(nn.Module):
    """One layer that is called twice, and one of GPT-2's kind."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.again, self.other = nn.Linear(4, 4), Conv1D(3, 4)

    def forward(self, x):
        return self.other(self.again(self.again(x).tanh()))


@pytest.mark.parametrize("route", ["pairs", "gradients"])
def test_a_layer_that_is_called_twice(route):
    model, x = Twice(), torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(1))
    recorder = GhostRecorder(model)
    request = GradientRequest("all", norms=True, gram=True, route=route)
    norms_only = GradientRequest("all", norms=True, route=route)
    with recorder.open([request, norms_only], Examples(3, 3, 5)) as (found, norms):
        model(x).square().sum().backward()
    expected = flat(alone(model, recorder.parameters("all"), model(x).square().sum(dim=(1, 2))))
    assert_close(found.gram, expected @ expected.T)
    assert_close(found.norms, expected.norm(dim=1))
    assert_close(norms.norms, expected.norm(dim=1))


def test_forwards_without_gradient_are_not_recorded():
    model, ids = llama(), tokens(3)
    recorder = GhostRecorder(model)
    with recorder.open([GradientRequest(norms=True)], Examples(3, *ids.shape)) as (found,):
        with torch.no_grad():
            row_losses(model, ids + 0)
        row_losses(model, ids).sum().backward()
    expected = flat(alone(model, recorder.parameters("linear"), row_losses(model, ids)))
    assert_close(found.norms, expected.norm(dim=1))


def test_what_did_not_fire_is_an_error():
    model, ids = Twice(), torch.randn(3, 5, 4)
    model.idle = nn.Linear(4, 4)
    recorder = GhostRecorder(model)
    with (
        pytest.raises(ValueError, match="'idle'"),
        recorder.open([GradientRequest("all", norms=True)], Examples(3, 3, 5)),
    ):
        model(ids).sum().backward()
    # It has let go of the model.
    model(ids).sum().backward()
    assert not model.again._forward_hooks


def test_other_rows_are_an_error():
    model = Twice()
    recorder = GhostRecorder(model)
    with (
        pytest.raises(ValueError, match="which are not the 3 rows"),
        recorder.open([GradientRequest("all", norms=True)], Examples(3, 3, 5)),
    ):
        model(torch.randn(4, 5, 4)).sum().backward()


def test_half_precision_sums_in_float32():
    model, ids = llama().bfloat16(), tokens(3, length=30)
    recorder, seen = GhostRecorder(model), {}

    def visit(name, a, b, scale):
        assert a.dtype == b.dtype == torch.bfloat16
        seen[name] = (torch.einsum("nto,nti->noi", b.float(), a.float()), b.float().sum(1))

    with recorder.open([GradientRequest(gram=True, norms=True, visit=visit)], Examples(3, *ids.shape)) as (found,):
        row_losses(model, ids).sum().backward()
    exact = torch.cat([part.flatten(1) for parts in seen.values() for part in parts], dim=1)
    biased = sum(layer.parameters.keys() >= {"bias"} for layer in find_layers(model))
    assert biased
    kept = torch.cat(
        [
            part.flatten(1)
            for layer in recorder.layers("linear")
            for part, own in zip(seen[layer.name], ("weight", "bias"), strict=True)
            if own in layer.parameters
        ],
        dim=1,
    )
    assert exact.shape[1] > kept.shape[1]
    assert found.gram.dtype == torch.float32
    assert_close(found.gram, kept @ kept.T)


def test_padding_free_rows_are_cut_into_examples():
    model = llama()
    model.config._attn_implementation = "eager"
    lengths = [4, 7, 5]
    pieces = [tokens(1, length, seed)[0] for seed, length in enumerate(lengths)]
    recorder = GhostRecorder(model)
    # One row of 18 positions, of which the last two are nobody's; attention within each example.
    ids = torch.cat([*pieces, torch.zeros(2, dtype=torch.long)])[None]
    owner = torch.repeat_interleave(torch.arange(4), torch.tensor([*lengths, 2]))
    mask = torch.where((owner[:, None] == owner) & torch.ones(18, 18).tril().bool(), 0.0, -1e9)[None, None]
    positions = torch.cat([torch.arange(n) for n in [*lengths, 2]])[None]

    def losses():
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[0]
        parts = list(zip(logits[:-2].split(lengths), pieces, strict=True))
        return [nn.functional.cross_entropy(part[:-1], piece[1:]) for part, piece in parts]

    with recorder.open([GradientRequest("all", gram=True)], Examples(3, 1, 18, torch.tensor(lengths))) as (found,):
        torch.stack(losses()).sum().backward()
    expected = flat(alone(model, recorder.parameters("all"), losses()))
    assert_close(found.gram, expected @ expected.T)
