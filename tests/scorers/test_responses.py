"""What is read of a response does not depend on its batch, and the model is left as it was."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from dsel_trl.data.tokens import IGNORED, padded
from dsel_trl.functional.audit.token_statistics import NAMES
from dsel_trl.scorers.responses import ResponseReader, _blocks


@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 5, "num_attention_heads": 2}
        return LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))


ROWS = [([1, 5, 6, 7, 8, 9], 3), ([1, 4, 4], 2), ([1, 9, 8, 7, 6, 5, 4, 3], 2)]


def inputs(rows):
    return padded([(tokens, [IGNORED] * start + tokens[start:]) for tokens, start in rows], 0, "cpu")


def test_a_row_alone_and_in_a_batch(model):
    reader = ResponseReader(model, [1])
    assert reader.layers == [2, 3, 5]
    model.train()
    together = reader.forward(inputs(ROWS), torch.arange(3))
    assert model.training
    for i, row in enumerate(ROWS):
        assert together[i] == pytest.approx(reader.forward(inputs([row]), torch.arange(1))[0], abs=1e-4)
    assert not any(module._forward_hooks for module in model.modules())
    statistics, states = reader.split(together.numpy())
    tokens, start = ROWS[0]
    with torch.no_grad():
        output = model.eval()(torch.tensor([tokens]), output_hidden_states=True)
    logps = output.logits[0].log_softmax(-1)
    total = sum(float(logps[i - 1, tokens[i]]) for i in range(start, len(tokens)))
    assert statistics[0, NAMES.index("sum")] == pytest.approx(total, abs=1e-4)
    assert states[3][0] == pytest.approx(output.hidden_states[3][0, start:].mean(0).numpy(), abs=1e-5)


def test_a_model_without_layers_is_named():
    with pytest.raises(ValueError, match="No list of 3 layers is found in a Linear"):
        _blocks(nn.Linear(1, 1), 3)
