"""Where there is no fused head: tokens are read of logits, and the gate sits inside a loss that a model computes."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, log_softmax, nll_loss
from torch.utils.checkpoint import checkpoint

from dsel_trl.signals.gate import Gate
from dsel_trl.signals.logits import beside_logits, read_logits
from dsel_trl.signals.tap import Tap

ROWS, LENGTH, HIDDEN, WORDS = 3, 7, 5, 11


def batch():
    torch.manual_seed(1)
    labels = torch.randint(WORDS, (ROWS, LENGTH))
    labels[0, :4] = -100
    labels[1, 5:] = -100
    return torch.randn(ROWS, LENGTH, HIDDEN), labels


class Output:
    def __init__(self, loss, logits):
        self.loss, self.logits = loss, logits


class Model(nn.Module):
    """Computes its loss itself, as causal models do: all at once, or in checkpointed chunks of the tokens in it."""

    def __init__(self, chunks, tokens):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(HIDDEN, WORDS)
        self.chunks, self.tokens = chunks, tokens

    def forward(self, hidden, labels=None):
        if labels is None:
            return Output(None, self.head(hidden))
        # A loss of something else, which is not to be weighted.
        other = cross_entropy(self.head(hidden[:, 0]), torch.arange(ROWS)) if self.chunks == "other" else 0.0
        if not isinstance(self.chunks, int):
            logits = self.head(hidden)
            targets = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
            total = cross_entropy(logits.view(-1, WORDS), targets.reshape(-1), ignore_index=-100, reduction="sum")
            return Output(total / self.tokens + other, logits)
        hidden, targets = hidden[:, :-1].reshape(-1, HIDDEN), labels[:, 1:].reshape(-1)
        order = (targets != -100).to(torch.int8).argsort(descending=True, stable=True)
        total = torch.zeros(())
        for chosen in order.split(self.chunks):
            total = total + checkpoint(self.chunk, hidden[chosen], targets[chosen], use_reentrant=False)
        return Output(total / self.tokens, None)

    def chunk(self, hidden, targets):
        return nll_loss(log_softmax(self.head(hidden), dim=-1), targets, ignore_index=-100, reduction="sum")


def token_losses(model, hidden, labels):
    logps = log_softmax(model.head(hidden[:, :-1]), dim=-1)
    return -logps.gather(2, labels[:, 1:].clamp(min=0).unsqueeze(2)).squeeze(2).masked_fill(labels[:, 1:] == -100, 0.0)


@pytest.mark.parametrize("per_token", [False, True], ids=["rows", "tokens"])
@pytest.mark.parametrize("chunks", ["whole", 4, 100])
def test_the_gate_inside_a_models_own_loss_is_exact(chunks, per_token):
    hidden, labels = batch()
    hidden.requires_grad_()
    tokens = int((labels[:, 1:] != -100).sum())
    model = Model(chunks, tokens)
    weights = torch.rand(ROWS, LENGTH - 1) * 2 if per_token else torch.tensor([0.0, 0.5, 3.0])
    expected = (token_losses(model, hidden, labels) * (weights if per_token else weights[:, None])).sum() / tokens
    wanted = torch.autograd.grad(expected, [hidden, *model.parameters()])

    gate = Gate()
    with Tap(model).open(labels, gate) as reading:
        output = model(hidden, labels=labels)
    torch.testing.assert_close(output.loss, token_losses(model, hidden, labels).sum() / tokens)
    gate.weights = weights
    found = torch.autograd.grad(output.loss, [hidden, *model.parameters()])
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(reading.policy.log_probs, -token_losses(model, hidden, labels).detach())
    assert not reading.without_gradient


@pytest.mark.parametrize("chunks", ["whole", 4])
def test_without_weights_nothing_changes_by_a_bit(chunks):
    hidden, labels = batch()
    model = Model(chunks, 3)
    model(hidden, labels=labels).loss.backward()
    stock = [parameter.grad.clone() for parameter in model.parameters()]
    for weights in (None, torch.ones(ROWS)):
        model.zero_grad()
        gate = Gate()
        with Tap(model).open(labels, gate):
            loss = model(hidden, labels=labels).loss
        gate.weights = weights
        loss.backward()
        assert all(
            torch.equal(parameter.grad, grad) for parameter, grad in zip(model.parameters(), stock, strict=True)
        )


def test_a_loss_of_something_else_is_left_alone():
    hidden, labels = batch()
    model, gate = Model("other", 1), Gate()
    with Tap(model).open(labels, gate):
        loss = model(hidden, labels=labels).loss
    gate.weights = torch.zeros(ROWS)
    loss.backward()
    found = model.head.bias.grad.clone()
    model.zero_grad()
    cross_entropy(model.head(hidden[:, 0]), torch.arange(ROWS)).backward()
    torch.testing.assert_close(found, model.head.bias.grad)
    assert found.abs().max() > 1e-3


def test_a_closed_tap_and_a_forward_that_fails_leave_the_loss_alone():
    hidden, labels = batch()
    model = Model("whole", 1)
    tap = Tap(model)
    with pytest.raises(RuntimeError), tap.open(labels, Gate()):
        model(hidden[:, :, :1], labels=labels)
    assert not torch.overrides._get_current_function_mode_stack()
    with tap.open(labels) as reading, torch.no_grad():
        model(hidden, labels=labels)
    assert reading.policy is None
    assert len(reading.without_gradient) == 1


@pytest.mark.parametrize("per_token", [False, True], ids=["rows", "tokens"])
def test_the_gate_on_logits_is_exact(per_token):
    hidden, labels = batch()
    model, gate = Model("whole", 1), Gate()
    weights = torch.rand(ROWS, LENGTH - 1) if per_token else torch.tensor([0.0, 0.5, 3.0])
    (token_losses(model, hidden, labels) * (weights if per_token else weights[:, None])).sum().backward()
    wanted = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    with Tap(model).open(labels, gate):
        logits = model(hidden).logits
    logps = log_softmax(logits[:, :-1], dim=-1).gather(2, labels[:, 1:].clamp(min=0).unsqueeze(2)).squeeze(2)
    gate.weights = weights
    (-logps * (labels[:, 1:] != -100)).sum().backward()
    for parameter, grad in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-5, atol=1e-7)


def test_logits_say_what_the_fused_head_says():
    hidden, labels = batch()
    logits = Model("whole", 1).head(hidden).detach()
    read = read_logits(logits, labels, ("entropy", "is_top1", "log_sum_sq_probs"))
    probs, targets = logits[:, :-1].double().softmax(-1), labels[:, 1:]
    valid = targets != -100
    expected = probs.gather(2, targets.clamp(min=0).unsqueeze(2)).squeeze(2).log()
    for found, wanted in (
        (read.log_probs, expected),
        (read.entropy, -(probs * probs.log()).sum(-1)),
        (read.log_sum_sq_probs, probs.square().sum(-1).log()),
        (read.is_top1.float(), (probs.argmax(-1) == targets).double()),
    ):
        torch.testing.assert_close(found, (wanted * valid).float(), rtol=1e-5, atol=1e-6)
    assert read_logits(logits, labels).entropy is None
    assert not read_logits(logits, torch.full_like(labels, -100)).log_probs.any()


def test_weights_beside_logits_keep_their_rows():
    assert beside_logits(torch.ones(2)).shape == (2,)
    assert beside_logits(torch.zeros(2, 3)).tolist() == [[0, 0, 0, 1]] * 2


def test_rows_of_two_kinds_are_told_apart_by_their_tokens():
    class Speaks(nn.Module):
        def forward(self, input_ids):
            return Output(None, torch.nn.functional.one_hot(input_ids, WORDS).float())

    ids, others = torch.tensor([[1, 2, 3]]), torch.tensor([[1, 5, 6]])
    labels, other_labels = ids.masked_fill(torch.tensor([[True, False, False]]), -100), others
    model = Speaks()
    with Tap(model).open(labels, other_labels=other_labels) as reading:
        for rows in (others, ids, torch.tensor([[7, 8, 9]])):
            model(input_ids=rows)
    expected = [
        read_logits(torch.nn.functional.one_hot(rows, WORDS).float(), rows).log_probs for rows in (others, ids)
    ]
    assert len(reading.without_gradient) == 2
    for found, wanted in zip(reading.without_gradient, expected, strict=True):
        torch.testing.assert_close(found.log_probs, wanted)
