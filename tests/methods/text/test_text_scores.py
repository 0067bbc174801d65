"""Methods that measure losses of the responses in other contexts: IFD, perplexity and EDGE."""

import numpy as np
import pytest
import torch

from dsel_trl import SelectionCallback, create_method
from dsel_trl.functional.text.perplexity import perplexity_band
from dsel_trl.signals.tap import label_log_probs
from tests import tiny


def run(make_trainer, kind, name, config=None, **parameters):
    trainer = make_trainer(kind, **{"max_steps": 1, "learning_rate": 0.0, **(config or {})})
    rows = list(trainer.train_dataset)
    callback = SelectionCallback(trainer, name, **parameters)
    trainer.train()
    return trainer, callback, rows


def response(row):
    """Prompt and response tokens of an example."""
    if "chosen_ids" in row:
        return row["prompt_ids"], row["chosen_ids"]
    answer = [label for label in row["labels"] if label != -100]
    return row["input_ids"][: len(row["input_ids"]) - len(answer)], answer


@torch.no_grad()
def mean_loss(trainer, context, answer):
    """Through the plain model, one example at a time."""
    ids = torch.tensor([context + answer])
    labels = torch.tensor([[-100] * len(context) + answer])
    model = trainer.model.eval()
    logps = label_log_probs(model(input_ids=ids).logits, labels)
    return float(-logps.sum() / len(answer))


@pytest.mark.parametrize("kind", ["dpo", "sft"])
@pytest.mark.parametrize("form", ["superfiltering", "cherry"])
def test_ifd_scores_the_same_tokens_with_and_without_the_instruction(make_trainer, kind, form):
    trainer, callback, rows = run(make_trainer, kind, "ifd", form=form, keep=0.3)
    prefix = [1] if form == "superfiltering" else [1, *trainer.processing_class("### Response:")["input_ids"]]
    given = np.array([mean_loss(trainer, *response(row)) for row in rows])
    alone = np.array([mean_loss(trainer, prefix, response(row)[1]) for row in rows])
    np.testing.assert_allclose(callback.ledger["ifd_conditioned"], given, rtol=1e-4)
    np.testing.assert_allclose(callback.ledger["ifd_alone"], alone, rtol=1e-4)
    ratio = np.exp(given - alone) if form == "superfiltering" else given / alone
    kept = ~callback.ledger.dropped
    fit = np.flatnonzero(ratio < 1)
    assert kept.sum() == int(0.3 * len(fit))
    assert set(np.flatnonzero(kept)) == set(fit[np.argsort(-ratio[fit])][: kept.sum()])


def test_ifd_under_another_model_is_that_models(make_trainer, tmp_path):
    other = tiny.build_model(tmp_path / "other", seed=5)
    _, own, _ = run(make_trainer, "sft", "ifd", keep=0.5)
    _, callback, rows = run(make_trainer, "sft", "ifd", keep=0.5, model=str(other))
    stranger = tiny.make_trainer("sft", other, tmp_path / "stranger")
    # The other model reads the text: no end token, and the start token stands before everything.
    expected = [mean_loss(stranger, [1, *response(row)[0]], response(row)[1][:-1]) for row in rows]
    np.testing.assert_allclose(callback.ledger["ifd_conditioned"], expected, rtol=1e-4)
    assert not np.allclose(callback.ledger["ifd"], own.ledger["ifd"])


def test_ifd_needs_an_instruction(make_trainer):
    trainer = make_trainer("lm")
    SelectionCallback(trainer, "ifd")
    with pytest.raises(ValueError, match="every token of this dataset is trained"):
        trainer.train()


@pytest.mark.parametrize("band", ["low", "mid", "high"])
def test_perplexity_bands(make_trainer, band):
    trainer, callback, rows = run(make_trainer, "sft", "perplexity", keep=0.3, band=band)
    losses = np.array([mean_loss(trainer, *response(row)) for row in rows])
    np.testing.assert_allclose(callback.ledger["perplexity"], losses, rtol=1e-4)
    assert np.flatnonzero(~callback.ledger.dropped).tolist() == perplexity_band(losses, 0.3, band).tolist()


def test_perplexity_is_measured_anew_each_epoch(make_trainer):
    config = {"max_steps": -1, "num_train_epochs": 2, "learning_rate": 5e-3}
    trainer, callback, _ = run(make_trainer, "sft", "perplexity", config, keep=0.5, band="high", refresh="epoch")
    assert (callback.ledger.steps("perplexity") == trainer.state.max_steps // 2).all()


@pytest.mark.parametrize(("action", "last"), [("band", 4), ("weight", 6)])
def test_perplexity_is_measured_anew_every_so_many_steps(make_trainer, action, last):
    config = {"max_steps": 6, "learning_rate": 5e-3}
    _, callback, _ = run(make_trainer, "sft", "perplexity", config, action=action, refresh=2)
    assert (callback.ledger.steps("perplexity") == last).all()


@pytest.mark.parametrize("kind", ["dpo", "sft", "lm"])
@pytest.mark.parametrize("form", ["ratio", "diff"])
def test_edge_measures_the_response_with_and_without_the_guideline(make_trainer, kind, form):
    trainer, callback, rows = run(
        make_trainer, kind, "edge", guideline="w5 w6 w7", form=form, keep=0.4, unfold="dataset"
    )
    guide = trainer.processing_class("w5 w6 w7\n")["input_ids"]
    effects = []
    for row in rows:
        context, answer = response(row)
        if not context:
            # The first token of a plain text has nothing before it, so it is scored in neither pass.
            context, answer = answer[:1], answer[1:]
        without, helped = mean_loss(trainer, context, answer), mean_loss(trainer, guide + context, answer)
        effects.append(without / helped if form == "ratio" else without - helped)
    np.testing.assert_allclose(callback.ledger["edge_effectiveness"], effects, rtol=1e-3, atol=1e-4)
    assert set(np.flatnonzero(~callback.ledger.dropped)) == set(np.argsort(effects)[:16])


@pytest.mark.parametrize("kind", ["dpo", "sft"])
def test_edge_scores_what_the_policy_itself_does(make_trainer, kind):
    """Its own greedy action under the guideline, with and without it; what the dataset answers is not read."""
    trainer, callback, rows = run(make_trainer, kind, "edge", guideline="w5 w6 w7", keep=0.4, max_new_tokens=5)
    guide = trainer.processing_class("w5 w6 w7")["input_ids"]
    model, effects = trainer.model.eval(), []
    for row in rows:
        context = response(row)[0]
        output = model.generate(torch.tensor([guide + context]), max_new_tokens=5, do_sample=False, pad_token_id=0)
        text = trainer.processing_class.decode(output[0, len(guide + context) :], skip_special_tokens=True)
        action = trainer.processing_class(text)["input_ids"]
        assert action
        effects.append(mean_loss(trainer, context, action) / mean_loss(trainer, guide + context, action))
    np.testing.assert_allclose(callback.ledger["edge_effectiveness"], effects, rtol=1e-3)
    assert set(np.flatnonzero(~callback.ledger.dropped)) == set(np.argsort(effects)[:16])
    column = "chosen" if kind == "dpo" else "completion"
    others = [{**row, column: " w1 w1 w1"} for row in tiny.DATASETS[kind]()]
    config = {"dataset": tiny.Dataset.from_list(others)}
    _, blind, _ = run(make_trainer, kind, "edge", config, guideline="w5 w6 w7", keep=0.4, max_new_tokens=5)
    np.testing.assert_array_equal(blind.ledger["edge"], callback.ledger["edge"])


def test_edge_needs_a_prompt_to_unfold_from(make_trainer):
    trainer = make_trainer("lm")
    SelectionCallback(trainer, "edge", guideline="w1")
    with pytest.raises(ValueError, match="a model acts on a prompt"):
        trainer.train()


def test_edge_turns_are_weighed_alike():
    """A conversation of two answers: the mean over turns is not the mean over tokens."""
    from dsel_trl.data.tokens import Sequences

    sequences = object.__new__(Sequences)
    sequences._rows = [0, 1]
    rows = {0: ([1] * 7, [-100, -100, 3, 4, -100, 5, 6]), 1: ([1] * 3, [7, 8, -100])}
    type(sequences).__getitem__, kept = (lambda self, ids: [rows[int(i)] for i in ids]), Sequences.__getitem__
    try:
        assert sequences.turn_starts(np.array([4, 1])).tolist() == [True, False, True, False, True]
    finally:
        Sequences.__getitem__ = kept


def test_edge_weights_follow_the_score(make_trainer):
    trainer = make_trainer("sft", max_steps=2, per_device_train_batch_size=4)
    witness = tiny.attach(trainer, "edge", guideline="w5 w6", action="weight", temperature=0.1, unfold="dataset")
    trainer.train()
    effect = trainer.selection.ledger["edge_effectiveness"].astype(np.float64)
    for step in witness.steps:
        raw = np.exp(-effect[step.ids] / 0.1)
        np.testing.assert_allclose(step.values["weight"], raw / raw.mean(), rtol=1e-4)


def test_edge_takes_a_guideline_per_row(make_trainer):
    _, one, _ = run(make_trainer, "sft", "edge", guideline="w5 w6", unfold="dataset")
    _, each, _ = run(
        make_trainer,
        "sft",
        "edge",
        unfold="dataset",
        guideline=lambda row: "w5 w6" if row["difficulty"] < 0.5 else "w9",
    )
    same = np.array(tiny.completions()["difficulty"]) < 0.5
    np.testing.assert_allclose(each.ledger["edge"][same], one.ledger["edge"][same], rtol=1e-4)
    assert not np.isclose(each.ledger["edge"][~same], one.ledger["edge"][~same]).any()


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("edge", {}, "guideline=None"),
        ("edge", {"guideline": "w1", "form": "quotient"}, "form='quotient'"),
        ("ifd", {"form": "cherrry"}, "cherry"),
        ("ifd", {"refresh": "epoch", "model": "gpt2"}, "refresh='epoch'"),
        ("perplexity", {"band": "middle"}, "band='middle'"),
        ("perplexity", {"action": "keep_top"}, "action='keep_top'"),
    ],
)
def test_wrong_parameters(name, parameters, message):
    with pytest.raises(ValueError, match=message):
        create_method(name, **parameters)


@pytest.mark.parametrize("unfold", ["policy", "dataset"])
def test_a_guideline_that_does_not_fit(make_trainer, unfold):
    trainer = make_trainer("sft")
    SelectionCallback(trainer, "edge", guideline="w1 " * 120, unfold=unfold)
    with pytest.raises(ValueError, match=r"tokens, but the model holds 128"):
        trainer.train()
