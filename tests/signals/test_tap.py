"""What the tap reads is what TRL computed: losses, margins and log-probabilities, without a forward of its own."""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import nn

from dsel_trl import Method, SelectionCallback
from dsel_trl.functional.dpo_losses import SEPARABLE_LOSSES
from dsel_trl.signals.batch import Forward, Signal
from dsel_trl.signals.gate import Gate
from dsel_trl.signals.pair_batch import PairBatch
from dsel_trl.signals.sequence_batch import SequenceBatch
from dsel_trl.signals.tap import Tap, label_log_probs
from dsel_trl.trainer.forwards import score_rows
from tests import tiny


@dataclass
class Looks(Method):
    """Keeps the batches it is shown."""

    batches: list = field(default_factory=list, init=False)

    name = "looks"
    trainers = ("dpo", "sft", "kto")
    packed_rows = True

    def score(self, batch):
        self.batches.append(batch)
        return batch.loss


def looked(trainer, stir=True):
    """Trains with the tap open; the batches, and the trainer's logged rows."""
    if stir:
        tiny.stir(trainer)
    method = Looks()
    trainer.add_callback(SelectionCallback(trainer, method))
    trainer.train()
    return method.batches, [row for row in trainer.state.log_history if "loss" in row]


SMOOTHING = {"robust": 0.1, "exo_pair": 1e-3}
PAIR_LOSSES = {
    **{name: {"loss_type": [name], "label_smoothing": SMOOTHING.get(name, 0.0)} for name in SEPARABLE_LOSSES},
    "forward_kl": {"f_divergence_type": "forward_kl"},
    "js_divergence": {"f_divergence_type": "js_divergence", "loss_type": ["hinge"]},
    "alpha_divergence": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.5},
    "ld_dpo": {"ld_alpha": 0.4},
    "wpo": {"use_weighting": True},
    "mpo": {"loss_type": ["sigmoid", "bco_pair", "ipo"], "loss_weights": [0.8, 0.2, 0.5]},
    "lora": {"lora": True, "beta": 0.3},
    "precomputed": {"precompute_ref_log_probs": True},
    "truncated": {"max_length": 10},
}


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_pair_values_are_those_that_trl_logs(make_trainer, name):
    # TRL's `sft` loss is the mean over the tokens of a batch: one pair per batch makes it that of a pair.
    size = 1 if name == "sft" else 3
    config = {"per_device_train_batch_size": size, "max_steps": 2, **PAIR_LOSSES[name]}
    batches, rows = looked(make_trainer("dpo", **config))
    assert len(batches) == len(rows) == 2
    for batch, row in zip(batches, rows, strict=True):
        assert isinstance(batch, PairBatch)
        assert float(batch.loss.mean()) == pytest.approx(row["loss"], rel=2e-5, abs=2e-6)
        assert float(batch.implicit_margin.mean()) == pytest.approx(row["rewards/margins"], rel=2e-5, abs=2e-6)
        assert float(batch.policy_chosen_logps.mean()) == pytest.approx(row["logps/chosen"], rel=1e-5)
        assert float(batch.policy_rejected_logps.mean()) == pytest.approx(row["logps/rejected"], rel=1e-5)
        assert batch.loss.shape == batch.implicit_margin.shape == (size,)
        assert batch.implicit_margin.abs().max() > 1e-3


@pytest.mark.parametrize(
    "config",
    [{}, {"padding_free": True, "max_length": None}, {"lora": True}, {"completion_only_loss": False}],
    ids=["padded", "flat", "lora", "prompt_too"],
)
def test_sequence_values_are_those_that_trl_logs(make_trainer, config):
    batches, rows = looked(make_trainer("sft", per_device_train_batch_size=3, max_steps=2, **config))
    for batch, row in zip(batches, rows, strict=True):
        assert isinstance(batch, SequenceBatch)
        mean = (batch.loss * batch.lengths).sum() / batch.lengths.sum()
        assert float(mean) == pytest.approx(row["loss"], rel=1e-5)
        assert batch.lengths.shape == batch.loss.shape == (3,)
        assert len(set(batch.lengths.tolist())) > 1


def test_flat_and_padded_examples_have_the_same_values(make_trainer):
    padded, _ = looked(make_trainer("lm", max_steps=1, per_device_train_batch_size=4))
    flat, _ = looked(
        make_trainer("lm", max_steps=1, per_device_train_batch_size=4, padding_free=True, max_length=None)
    )
    assert flat[0].policy.log_probs.shape[0] == 1
    assert padded[0].ids.tolist() == flat[0].ids.tolist()
    assert padded[0].lengths.tolist() == flat[0].lengths.tolist()
    torch.testing.assert_close(padded[0].policy_logps, flat[0].policy_logps, rtol=1e-5, atol=1e-5)


def test_padding_of_a_flat_row_belongs_to_no_further_example(make_trainer):
    config = {"max_steps": 1, "per_device_train_batch_size": 3, "padding_free": True, "max_length": None}
    plain, _ = looked(make_trainer("lm", **config))
    padded, _ = looked(make_trainer("lm", pad_to_multiple_of=64, **config))
    assert padded[0].inputs["input_ids"].shape[1] > plain[0].inputs["input_ids"].shape[1]
    assert padded[0].lengths.tolist() == plain[0].lengths.tolist()
    torch.testing.assert_close(padded[0].loss, plain[0].loss, rtol=1e-5, atol=1e-5)


def test_a_packed_row_is_one_example(make_trainer):
    """Several documents lie in a row; its values are those of the row, wherever the documents begin."""
    trainer = make_trainer("lm", packing=True, max_length=40, max_steps=1, per_device_train_batch_size=2)
    rows = len(trainer.train_dataset)
    assert any(len(lengths) > 1 for lengths in trainer.train_dataset["seq_lengths"])
    batches, logged = looked(trainer)
    batch = batches[0]
    assert rows < 40
    assert batch.size == 2
    documents = [trainer.train_dataset[i]["seq_lengths"] for i in batch.ids.tolist()]
    # The first token of each document carries no loss.
    assert batch.lengths.tolist() == [sum(lengths) - len(lengths) for lengths in documents]
    mean = (batch.loss * batch.lengths).sum() / batch.lengths.sum()
    assert float(mean) == pytest.approx(logged[0]["loss"], rel=1e-5)


@pytest.mark.parametrize("kind", ["dpo", "sft"])
def test_listening_runs_no_forward(make_trainer, kind):
    def forwards(method):
        trainer = make_trainer(kind, max_steps=2)
        count = [0]
        for model in [trainer.model, getattr(trainer, "ref_model", None)]:
            if model is not None:
                model.model.register_forward_pre_hook(lambda *args: count.__setitem__(0, count[0] + 1))
        if method:
            trainer.add_callback(SelectionCallback(trainer, method))
        trainer.train()
        return count[0]

    assert forwards(Looks()) == forwards(None) > 0


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", ["dpo", "sft"])
def test_an_extra_pass_measures_the_same_and_leaves_no_trace(make_trainer, kind, lora):
    """The values of a pass are those of the training forward, and the trainer's metrics do not hear of it."""
    trainer = make_trainer(kind, lora=lora, max_steps=1, learning_rate=0.0, per_device_train_batch_size=3)
    batches, _ = looked(trainer)
    trained = batches[0]
    tokens, metrics = trainer._total_train_tokens, {k: dict(v) for k, v in trainer._metrics.items()}
    trainer.model.train()
    measured = trainer.selection.run.passes.measure(lambda batch: batch.loss, trained.ids.numpy())
    np.testing.assert_allclose(measured, trained.loss.numpy(), rtol=1e-4, atol=1e-5)
    if kind == "dpo":
        margins = trainer.selection.run.passes.measure(lambda batch: batch.implicit_margin, trained.ids.numpy())
        np.testing.assert_allclose(margins, trained.implicit_margin.numpy(), rtol=1e-3, atol=1e-4)
    assert trainer._total_train_tokens == tokens
    assert {k: dict(v) for k, v in trainer._metrics.items()} == metrics
    assert trainer.model.training


def test_a_pass_without_the_reference_knows_no_margin(make_trainer):
    trainer = make_trainer("dpo", max_steps=1)
    looked(trainer)
    inputs = trainer.selection.run.rows.collate(np.array([1, 2]))
    batch = score_rows(trainer, inputs, torch.tensor([1, 2]), reference=False)
    assert batch.policy_chosen_logps.shape == (2,)
    with pytest.raises(ValueError, match="without its reference model"):
        _ = batch.implicit_margin


def test_a_reference_that_is_gone_is_named(make_trainer):
    """Precomputed references serve the examples they were computed for; without them a pass must say why it cannot."""
    trainer = make_trainer("dpo", precompute_ref_log_probs=True, max_steps=1)
    looked(trainer)
    passes = trainer.selection.run.passes
    assert np.isfinite(passes.measure(lambda batch: batch.implicit_margin, np.arange(4))).all()
    inputs = {
        key: value
        for key, value in trainer.selection.run.rows.collate(np.array([1])).items()
        if not key.startswith("ref_")
    }
    with pytest.raises(ValueError, match="reference model is gone"):
        score_rows(trainer, inputs, torch.tensor([1]))


# ---- Tap and batches alone ----


class Output:
    def __init__(self, **values):
        self.__dict__.update(values)


class Speaks(nn.Module):
    """A model whose outputs carry the log-probabilities of its only parameter."""

    def __init__(self, name):
        super().__init__()
        self.name = name
        self.values = nn.Parameter(-torch.rand(2, 5, 7))

    def forward(self):
        return Output(**{self.name: self.values * 1 if self.name == "logits" else self.values[..., 0] * 1})


def test_outputs_with_and_without_gradient_are_told_apart():
    model = Speaks("log_probs")
    tap = Tap(model)
    with tap.open() as reading:
        model()
        with torch.no_grad():
            model.values += 1
            model()
    torch.testing.assert_close(reading.reference.log_probs, reading.policy.log_probs + 1)
    model()
    assert tap._reading is None
    tap.close()
    with tap.open() as reading:
        model()
    assert reading.policy is None


def test_a_model_without_the_fused_head_is_read_from_its_logits():
    model, labels = Speaks("logits"), torch.tensor([[0, 1, 2, -100, 3], [0, -100, 4, 5, 6]])
    gate = Gate()
    with Tap(model).open(labels, gate) as reading:
        output = model()
    expected = torch.log_softmax(model.values[:, :-1], -1)
    for row, position, label in [(0, 0, 1), (0, 1, 2), (1, 1, 4), (1, 3, 6)]:
        torch.testing.assert_close(reading.policy.log_probs[row, position], expected[row, position, label].detach())
    assert reading.policy.log_probs[0, 2] == 0
    assert reading.policy.log_probs[1, 0] == 0
    gate.weights = torch.tensor([3.0, 0.0])
    output.logits.sum().backward()
    assert model.values.grad[0].unique().tolist() == [3.0]
    assert not model.values.grad[1].any()


def test_the_expected_log_probability_is_read_from_logits_where_asked_for():
    model, labels = Speaks("logits"), torch.zeros(2, 5, dtype=torch.long)
    with Tap(model, outputs=("log_sum_sq_probs",)).open(labels) as reading:
        model()
    expected = (model.values.detach()[:, :-1].softmax(-1) ** 2).sum(-1).log()
    torch.testing.assert_close(reading.policy.log_sum_sq_probs, expected)
    other = Speaks("logits")
    with Tap(other).open(labels) as reading:
        other()
    assert reading.policy.log_sum_sq_probs is None


def test_other_outputs_are_ignored():
    model = Speaks("hidden")
    with Tap(model).open(torch.zeros(2, 5, dtype=torch.long)) as reading:
        model()
    # Not as a whole: from Python 3.13 on, records that hold tensors cannot be compared.
    assert reading.policy is None
    assert reading.without_gradient == []


def test_half_precision_logits_are_upcast():
    logits = torch.randn(1, 3, 11).bfloat16()
    labels = torch.tensor([[0, 4, 5]])
    assert label_log_probs(logits, labels).dtype == torch.float32


def pair_batch(mask, log_probs, **context):
    inputs = {"completion_mask": mask, "attention_mask": torch.ones_like(mask)}
    return PairBatch(torch.arange(len(mask) // 2), inputs, Forward(log_probs), Forward(log_probs * 0), **context)


def test_weights_per_pair_row_and_token():
    mask = torch.tensor([[0, 1, 1, 0], [0, 0, 1, 1], [0, 1, 0, 0], [0, 1, 1, 1]])
    batch = pair_batch(mask, -torch.ones(4, 3))
    pairs, rows = torch.tensor([2.0, 0.5]), torch.tensor([1.0, 2.0, 3.0, 4.0])
    tokens = torch.arange(12.0).view(4, 3)
    assert batch.row_weights(pairs).tolist() == [2.0, 0.5, 2.0, 0.5]
    assert batch.row_weights(rows) is rows
    assert batch.row_weights(tokens) is tokens
    assert batch.example_weights(batch.row_weights(pairs)).tolist() == [2.0, 0.5]
    assert batch.example_weights(rows).tolist() == [2.0, 3.0]
    # Means over the completion tokens of each row: 0.5, 4.5, 6 and 10.
    assert batch.example_weights(tokens).tolist() == [3.25, 7.25]


def test_a_batch_without_columns_says_so():
    batch = pair_batch(torch.ones(2, 3, dtype=torch.long), -torch.ones(2, 2))
    with pytest.raises(ValueError, match="'score' was asked for"):
        batch.column("score")
    assert batch.gather(torch.tensor([5.0]))[1] == slice(0, 1)


def test_examples_without_a_trained_token_have_loss_zero():
    labels = torch.tensor([[-100, 3, 4], [-100, -100, -100]])
    inputs = {"labels": labels, "input_ids": labels.clamp(min=0)}
    batch = SequenceBatch(torch.arange(2), inputs, Forward(torch.tensor([[-1.0, -3.0], [0.0, 0.0]])))
    assert batch.lengths.tolist() == [2, 0]
    assert batch.loss.tolist() == [2.0, 0.0]
    assert batch.example_weights(torch.tensor([[2.0, 4.0], [1.0, 1.0]])).tolist() == [3.0, 0.0]
    with pytest.raises(NotImplementedError, match="Only preference pairs"):
        _ = batch.implicit_margin


def test_signals_are_words():
    assert Signal("implicit_margin") is Signal.IMPLICIT_MARGIN
    assert str(Signal.LOSS) == "loss"
