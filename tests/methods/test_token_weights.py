"""Weights of turns and tokens: the gradient is that of the loss with these weights, and lists must fit their rows."""

import numpy as np
import pytest
import torch
from datasets import Dataset

from dsel_trl import SelectionCallback
from dsel_trl.data.fingerprints import dataset_fingerprint
from tests import tiny, weighted


@pytest.fixture(autouse=True)
def _no_picture(no_picture):
    """Every run of this file ends without a picture."""


def conversations(size=8, first_trained=False):
    """Tokenised rows of one to three trained turns, each with its weights and, token by token, what they come to."""
    rng = np.random.default_rng(3)
    rows = []
    for i in range(size):
        tokens, labels, turns, along = [], [], [], []
        for turn in range(1 + i % 3):
            asked = 0 if first_trained and not turn else int(rng.integers(1, 4))
            answered = int(rng.integers(2, 6))
            words = rng.integers(3, 300, size=asked + answered).tolist()
            weight = float(np.float32(rng.uniform(0.1, 3.0))) if (i + turn) % 4 else 0.0
            tokens += words
            labels += [-100] * asked + words[asked:]
            turns.append(weight)
            along += [weight] * answered
        own = [float(np.float32(w)) for w in rng.uniform(0.1, 3.0, size=len(along))]
        own[0] = 0.0
        rows.append({"input_ids": tokens, "labels": labels, "turn": turns, "token": own, "turn_along": along,
                     "one": [1.0] * len(along)})  # fmt: skip
    return rows


def trainer_on(make_trainer, rows, **config):
    config = {"max_steps": 1, "per_device_train_batch_size": len(rows), "max_grad_norm": 0.0, **config}
    return make_trainer("sft", dataset=Dataset.from_list(rows), **config)


def explicit_gradient(trainer, rows, along, normalize):
    """Sum over tokens of weight times loss, over their number; `along` has a weight per trained token of each row."""
    weights = [np.array(own[-sum(label != -100 for label in row["labels"][1:]) :]) for row, own in along]
    count = sum(len(own) for own in weights)
    mean = np.mean([own.mean() for own in weights]) if normalize == "mean1" else 1.0
    trainer.model.zero_grad()
    for (row, _), own in zip(along, weights, strict=True):
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"][1:])
        logps = trainer.model(input_ids=ids).logits[0, :-1].log_softmax(dim=-1)
        trained = labels != -100
        terms = logps[trained].gather(1, labels[trained, None]).squeeze(1)
        (-(terms * torch.tensor(own / mean, dtype=terms.dtype)).sum() / count).backward()
    return weighted.gradients(trainer.model)


@pytest.mark.parametrize("config", [{}, {"padding_free": True, "max_length": None}, {"lora": True},
                                    {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}],
                         ids=["plain", "padding_free", "lora", "accumulation"])  # fmt: skip
@pytest.mark.parametrize(("per", "first_trained"), [("turn", False), ("token", False), ("token", True)])
@pytest.mark.parametrize("normalize", ["none", "mean1"])
def test_the_gradient_is_that_of_the_weighted_loss(make_trainer, config, per, first_trained, normalize):
    rows = conversations(first_trained=first_trained)
    trainer = trainer_on(make_trainer, rows, learning_rate=0.0, **config)
    tiny.stir(trainer)
    keep = weighted.KeepGradients()
    trainer.add_callback(keep)
    trainer.add_callback(SelectionCallback(trainer, "weight_column", column=per, per=per, normalize=normalize))
    trainer.train()
    trainer.selection.detach()
    along = [(row, row["turn_along" if per == "turn" else "token"]) for row in rows]
    explicit = explicit_gradient(trainer, rows, along, normalize)
    outcome = weighted.Outcome(keep.gradients, explicit, {}, torch.empty(0), None)
    assert outcome.error < 1e-4
    plain = explicit_gradient(trainer, rows, [(row, row["one"]) for row in rows], normalize)
    assert weighted.Outcome(keep.gradients, plain, {}, torch.empty(0), None).error > 1e-2


@pytest.mark.parametrize("config", [{}, {"padding_free": True, "max_length": None}], ids=["plain", "padding_free"])
def test_weights_of_one_are_stock(make_trainer, config):
    rows = conversations()
    config |= {"per_device_train_batch_size": 2, "max_steps": 3}
    stock, other = (trainer_on(make_trainer, rows, **config) for _ in range(2))
    other.add_callback(SelectionCallback(other, "weight_column", column="one", per="token"))
    stock.train()
    other.train()
    assert tiny.losses_of(other) == tiny.losses_of(stock)
    tiny.assert_same_weights(tiny.weights_of(other), tiny.weights_of(stock))


@pytest.mark.parametrize(("mode", "kept"), [("keep_start", slice(None, 6)), ("keep_end", slice(-6, None))])
@pytest.mark.parametrize("per", ["turn", "token"])
def test_lists_are_cut_where_their_rows_were(make_trainer, mode, kept, per):
    rows = conversations()
    trainer = trainer_on(make_trainer, rows, max_length=6, truncation_mode=mode, learning_rate=0.0)
    method = SelectionCallback(trainer, "weight_column", column=per, per=per, normalize="none")
    trainer.add_callback(method)
    trainer.train()
    found = method.methods.methods[0]._tokens
    for i, row in enumerate(rows):
        trained = np.array(row["labels"]) != -100
        everywhere = np.zeros(len(trained))
        everywhere[trained] = row["turn_along" if per == "turn" else "token"]
        expected = everywhere[kept][1:][trained[kept][1:]]
        np.testing.assert_array_equal(found.of(np.array([i])), expected.astype(np.float32))


def changed(name, value, row=2):
    rows = conversations()
    for i, own in enumerate(rows):
        own[name] = value(own[name]) if i == row or row is None else own[name]
    return rows


BAD = {
    "short turns": (changed("turn", lambda w: w[:-1]), "turn", r"'turn' has 2 weights at row 2, whose turns are 3"),
    "long turns": (changed("turn", lambda w: [*w, 1.0]), "turn", r"has 4 weights at row 2, whose turns are 3"),
    "short": (changed("token", lambda w: w[:-1]), "token", r"'token' has \d+ weights at row 2, whose trained tokens"),
    "negative": (changed("token", lambda w: [*w[:-1], -0.5]), "token", r"negative.*-0\.5 at row 2\. Set allow_neg"),
    "zero": (changed("token", lambda w: [0.0] * len(w), None), "token", r"'token' is zero everywhere"),
    "numbers": (changed("token", len, None), "token", r"per='token' needs lists of numbers.*int64.*per='example'"),
    "texts": (changed("token", lambda w: list(map(str, w)), None), "token", r"lists of string"),
    "lists": (conversations(), "example", r"'token' holds lists.*per='turn'.*per='token'"),
}


@pytest.mark.parametrize("bad", BAD)
def test_what_does_not_fit_stops_before_the_first_step(make_trainer, bad):
    rows, per, message = BAD[bad]
    trainer = trainer_on(make_trainer, rows)
    column = "turn" if per == "turn" else "token"
    with pytest.raises(ValueError, match=message):
        trainer.add_callback(SelectionCallback(trainer, "weight_column", column=column, per=per)) or trainer.train()
    assert trainer.state.global_step == 0


def test_missing_weights_are_zero(make_trainer):
    rows = conversations()
    rows[1]["token"], rows[2]["token"][1] = None, None
    trainer = trainer_on(make_trainer, rows)
    trainer.add_callback(SelectionCallback(trainer, "weight_column", column="token", per="token", normalize="none"))
    trainer.train()
    found = trainer.selection.methods.methods[0]._tokens
    assert not found.of(np.array([1])).any()
    assert found.of(np.array([2]))[1] == 0
    assert found.of(np.array([2]))[2] == np.float32(rows[2]["token"][2])


def test_a_changed_list_is_another_dataset():
    rows = conversations()
    first = dataset_fingerprint(Dataset.from_list(rows), (), ("token",))
    assert first == dataset_fingerprint(Dataset.from_list(conversations()), (), ("token",))
    rows[3]["token"][1] += 0.5
    assert first != dataset_fingerprint(Dataset.from_list(rows), (), ("token",))


def test_other_losses_and_streams_are_refused(make_trainer):
    pairs = tiny.preferences()
    pairs = pairs.add_column("lists", [[1.0]] * len(pairs))
    for trainer, message in [
        (make_trainer("dpo", dataset=pairs, max_steps=1), r"per='token'.*'dpo'.*per='example'"),
        (make_trainer("sft", dataset=Dataset.from_list(conversations()).rename_column("one", "lists")
                      .to_iterable_dataset(), max_steps=1), r"per='token'.*stream"),
    ]:  # fmt: skip
        trainer.add_callback(SelectionCallback(trainer, "weight_column", column="lists", per="token"))
        with pytest.raises(ValueError, match=message):
            trainer.train()
