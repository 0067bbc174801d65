"""Weights of turns, parts and tokens: the gradient is that of the weighted loss, and lists must fit their rows."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import PromptTuningConfig

from dsel_trl import SelectionCallback
from dsel_trl.data.fingerprints import dataset_fingerprint
from tests import tiny, weighted


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


def explicit_gradient(trainer, along, normalize):
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
    explicit = explicit_gradient(trainer, along, normalize)
    outcome = weighted.Outcome(keep.gradients, explicit, {}, torch.empty(0), None)
    assert outcome.error < 1e-4
    plain = explicit_gradient(trainer, [(row, row["one"]) for row in rows], normalize)
    assert weighted.Outcome(keep.gradients, plain, {}, torch.empty(0), None).error > 1e-2


def in_parts(size=8):
    """Prompts and completions with weights of their own, [w_prompt, w_completion]."""
    rng = np.random.default_rng(4)
    weights = [[float(np.float32(w)) for w in rng.uniform(0.1, 3.0, size=2)] for _ in range(size)]
    weights[1][0] = 0.0
    rows = tiny.completions(size).add_column("part", weights)
    return rows.add_column("ones", [[1.0, 1.0]] * size).add_column("completion_only", [[0.0, 1.0]] * size)


def gradient_in_parts(make_trainer, column=None, **config):
    """The trainer and the gradient of one step; without a column of its stock."""
    config = {"max_steps": 1, "per_device_train_batch_size": 8, "max_grad_norm": 0.0, **config}
    trainer = make_trainer("sft", dataset=in_parts(), **{"completion_only_loss": False, **config})
    tiny.stir(trainer)
    keep = weighted.KeepGradients()
    trainer.add_callback(keep)
    if column is not None:
        trainer.add_callback(SelectionCallback(trainer, "weight_column", column=column, per="part", normalize="none"))
    trainer.train()
    if column is not None:
        trainer.selection.detach()
    return trainer, keep.gradients


@pytest.mark.parametrize("config", [{}, {"padding_free": True, "max_length": None}, {"max_length": 9},
                                    {"max_length": 9, "truncation_mode": "keep_end"}],
                         ids=["plain", "padding_free", "cut", "cut_start"])  # fmt: skip
def test_prompts_and_completions_weigh_what_their_rows_say(make_trainer, config):
    trainer, found = gradient_in_parts(make_trainer, "part", learning_rate=0.0, **config)
    along = []
    for row in trainer.train_dataset:
        assert row["labels"] == row["input_ids"]
        kept = len(row["input_ids"])
        mask = row["completion_mask"][-kept:] if "truncation_mode" in config else row["completion_mask"][:kept]
        along.append((row, [row["part"][place] for place in mask]))
    assert any(len(set(weights)) == 2 for _, weights in along)
    explicit = explicit_gradient(trainer, along, "none")
    assert weighted.Outcome(found, explicit, {}, torch.empty(0), None).error < 1e-4


def test_a_prompt_of_weight_zero_is_not_trained_on(make_trainer):
    _, found = gradient_in_parts(make_trainer, "completion_only", learning_rate=0.0)
    _, other = gradient_in_parts(make_trainer, completion_only_loss=True, learning_rate=0.0)
    # Stock's mean is over the tokens that carry loss, here the prompt's too.
    scale = max(float(g.norm()) for g in other.values()) / max(float(g.norm()) for g in found.values())
    assert scale > 1
    scaled = {name: scale * gradient for name, gradient in found.items()}
    assert weighted.Outcome(scaled, other, {}, torch.empty(0), None).error < 1e-4


def test_parts_of_weight_one_are_stock(make_trainer):
    config = {"per_device_train_batch_size": 2, "max_steps": 3}
    stock, other = (gradient_in_parts(make_trainer, column, **config)[0] for column in (None, "ones"))
    assert tiny.losses_of(other) == tiny.losses_of(stock)
    tiny.assert_same_weights(tiny.weights_of(other), tiny.weights_of(stock))


@pytest.mark.parametrize(
    ("column", "config", "message"),
    [
        (
            "part",
            {"completion_only_loss": True},
            r"do not say where a trained prompt ends.*completion_only_loss=False",
        ),
        ("three", {}, r"'three' has 3 weights at row 0, whose parts \(prompt and completion\) are 2"),
    ],
)
def test_what_has_no_parts_is_refused(make_trainer, column, config, message):
    rows = in_parts().add_column("three", [[1.0, 1.0, 1.0]] * 8)
    trainer = make_trainer("sft", dataset=rows, max_steps=1, **{"completion_only_loss": False, **config})
    with pytest.raises(ValueError, match=message):
        trainer.add_callback(SelectionCallback(trainer, "weight_column", column=column, per="part")) or trainer.train()
    assert trainer.state.global_step == 0


def test_tokens_behind_a_prompt_of_peft_weigh_what_their_rows_say(make_trainer):
    rows = conversations()
    runs = []
    for column, per in (("turn", "turn"), ("turn_along", "token"), ("one", "token")):
        made = trainer_on(make_trainer, rows, learning_rate=0.5)
        trainer = type(made)(
            made.model, args=made.args, train_dataset=Dataset.from_list(rows), processing_class=made.processing_class,
            peft_config=PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
        )  # fmt: skip
        trainer.add_callback(SelectionCallback(trainer, "weight_column", column=column, per=per))
        trainer.train()
        runs.append(tiny.weights_of(trainer))
    tiny.assert_same_weights(runs[0], runs[1])
    assert any(not torch.equal(value, runs[2][name]) for name, value in runs[0].items())


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
