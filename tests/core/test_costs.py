"""The counter of what selection adds: against the models' own calls, over processes, and across a resume."""

import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dsel_trl import SelectionCallback
from dsel_trl.core.costs import WORK, Costs, all_forwards
from dsel_trl.core.data_passes import Passes
from dsel_trl.trainer.generation import generate
from tests import tiny

LENGTHS = np.arange(1, 12)


def passes_with(costs, rank=0, world=1, what="forwards"):
    def forward(inputs, ids, **how):
        if what is not None:
            costs.ran(what, len(ids), 0)
        return inputs

    rows = SimpleNamespace(pass_lengths=LENGTHS, collate=lambda ids: torch.from_numpy(ids.copy()))
    return Passes(lambda: rows, forward, rank, world, costs=costs)


# ---- Counting ----


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_pass_counts_each_example_once_on_every_process(world):
    ids = np.array([0, 3, 3, 10])
    for rank in range(world):
        costs = Costs()
        passes_with(costs, rank, world).measure(lambda batch: batch, ids, tokens=5)
        assert costs.counts == {"forwards": 4, "forward_tokens": 1 + 4 + 4 + 11}


def test_a_forward_that_says_nothing_is_another_models():
    costs = Costs()
    passes_with(costs, what=None).measure(lambda batch: batch, forward=lambda inputs, ids: inputs)
    assert costs.counts == {"scorer_forwards": 11, "scorer_forward_tokens": 66}


def test_an_empty_pass_costs_nothing():
    costs = Costs()
    assert passes_with(costs).measure(lambda batch: batch, np.empty(0, dtype=int)).shape == (0,)
    assert not sum(costs.counts.values())


def test_what_is_not_collected_counts_at_once():
    costs = Costs()
    costs.ran("forwards", 3, 40)
    with costs.collecting() as ran:
        costs.ran("forwards", 3, 40)
        costs.ran("forwards", 3, 40)
        costs.ran("reference_forwards", 3, 40)
    assert costs.counts == {"forwards": 3, "forward_tokens": 40}
    costs.add_all(ran, 10, 100)
    assert costs.counts["forwards"] == 23
    assert costs.counts["reference_forward_tokens"] == 100


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="'backward' is none of"):
        Costs().add("backward", 1)


def test_nested_clocks_count_once(monkeypatch):
    times = iter([10.0, 11.0, 15.0])
    monkeypatch.setattr("dsel_trl.core.costs.time", SimpleNamespace(perf_counter=lambda: next(times)))
    costs = Costs()
    with costs.clock(), costs.clock():
        pass
    assert costs.seconds == 5.0


def test_the_state_is_json_and_comes_back():
    costs, other = Costs(), Costs()
    costs.add("rewards", 5, 12)
    costs.add("helper_runs", 1)
    other.load_state_dict(json.loads(json.dumps(costs.state_dict())))
    assert other.summary(10) == costs.summary(10)
    assert costs.summary(10)["per_example"] == {"rewards": 0.5}
    assert "per_example" not in costs.summary(0)
    costs.reset()
    assert not costs.counts


def test_helper_trainings_are_among_all_forwards():
    assert all_forwards({"forwards": 1, "helper_forwards": 2, "helper_backwards": 4, "forward_tokens": 8}) == 3
    assert all_forwards({}) == 0


# ---- Against the models ----


class Calls:
    """Counts the rows that go through a trainer's models outside of its own training step."""

    def __init__(self, trainer):
        self.rows = Counter()
        trainer.model.register_forward_pre_hook(self._hook("policy", lambda: trainer.model.training), with_kwargs=True)
        # While a step is computed the policy trains; a pass holds it in evaluation mode.
        if getattr(trainer, "ref_model", None) is not None:
            trainer.ref_model.register_forward_pre_hook(
                self._hook("reference", lambda: trainer.model.training), with_kwargs=True
            )

    def _hook(self, name, training):
        def hook(module, args, kwargs):
            if not training():
                self.rows[name] += len(kwargs["input_ids"])

        return hook


@pytest.mark.parametrize(
    ("name", "parameters", "policy", "reference"),
    [
        ("alignment_potential", {"form": "simpo"}, True, False),
        ("alignment_potential", {"form": "dpo"}, True, True),
        ("infobatch", {"prescore": True}, True, True),
        ("select_k_of_b", {"by": "implicit_margin"}, True, True),
        ("select_k_of_b", {"by": "explicit_margin"}, False, False),
        ("select_k_of_b", {"by": "length"}, False, False),
        ("jest", {"model": "the policy's own folder"}, True, True),
        ("selective_dpo", {"source": "online", "refresh": 1}, True, True),
    ],
)
def test_the_counter_is_what_the_models_ran(make_trainer, model, name, parameters, policy, reference):
    trainer = make_trainer("dpo", max_steps=4)
    if "model" in parameters:
        parameters = {"model": str(model)}
    calls = Calls(trainer)
    tiny.attach(trainer, name, **parameters)
    trainer.train()
    counts = trainer.selection.costs.counts
    assert calls.rows == Counter(policy=2 * counts["forwards"], reference=2 * counts["reference_forwards"])
    assert (counts["forwards"] > 0, counts["reference_forwards"] > 0) == (policy, reference)
    assert (counts["forward_tokens"] > counts["forwards"]) == policy


def test_references_in_the_data_are_no_forwards(make_trainer):
    trainer = make_trainer("dpo", max_steps=1, precompute_ref_log_probs=True)
    tiny.attach(trainer, "infobatch", prescore=True)
    trainer.train()
    assert trainer.selection.costs.counts["forwards"] == 40
    assert not trainer.selection.costs.counts["reference_forwards"]


def test_tokens_are_those_of_the_rows_without_padding(make_trainer):
    trainer = make_trainer("dpo", max_steps=1)
    tiny.attach(trainer, "infobatch", prescore=True)
    trainer.train()
    rows = trainer.train_dataset
    tokens = sum(2 * len(r["prompt_ids"]) + len(r["chosen_ids"]) + len(r["rejected_ids"]) for r in rows)
    counts = trainer.selection.costs.counts
    assert counts["forward_tokens"] == counts["reference_forward_tokens"] == tokens


@pytest.mark.parametrize("action", ["band", "weight"])
@pytest.mark.parametrize(("refresh", "times"), [("never", 1), ("epoch", 2), (7, 3), (5, 4)])
def test_scores_measured_again_cost_what_the_card_says(make_trainer, refresh, times, action):
    # Two epochs of 10 steps. After the last one weights are measured all the same, but no plan is made.
    trainer = make_trainer("sft", dataset=tiny.completions(20), max_steps=20)
    tiny.attach(trainer, "perplexity", refresh=refresh, action=action, **({"keep": 1.0} if action == "band" else {}))
    trainer.train()
    selection = trainer.selection
    times += action == "weight" and refresh == 5
    assert selection.methods.methods[0].expected_cost(selection.run) == {"forwards": (20 * times, 20 * times)}
    assert selection.costs.counts["forwards"] == 20 * times


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("kind", ["dpo", "sft"])
def test_a_helper_counts_its_training_and_its_measuring(make_trainer, kind, lora):
    trainer = make_trainer(kind, max_steps=1)
    tiny.attach(trainer, "s2l", checkpoints=2, clusters=2, helper_lora=lora, helper_epochs=0.5, keep=0.8)
    trainer.train()
    cost = trainer.selection.costs.summary(40)
    # Half an epoch of training, and two measurements of all examples.
    expected = {"helper_forwards": 2.5, "helper_backwards": 0.5}
    if kind == "dpo":
        expected["helper_reference_forwards"] = 2.5
    assert cost["per_example"] == expected
    assert (cost["helper_runs"], cost["helper_steps"]) == (1, 10)
    assert cost["seconds"] > 0


def test_generated_tokens_are_counted_up_to_the_end_of_each_response(make_trainer):
    trainer, costs = make_trainer("dpo"), Costs()
    texts = generate(trainer, ["w1 w2", "w3"], samples=2, max_new_tokens=5, costs=costs)
    words = sum(len(text.split()) for row in texts for text in row)
    assert costs.counts["generated_responses"] == 4
    assert costs.counts["prompt_tokens"] == 2 * 3
    # Special tokens (the end, an unknown word) are generated but not read.
    assert words <= costs.counts["generated_tokens"] <= 20


def test_responses_without_an_end_are_counted_and_left_out(make_trainer, caplog):
    trainer, found = make_trainer("dpo"), {}
    trainer.model.generation_config.eos_token_id = list(range(1, 12))
    for whole in (False, True):
        costs = Costs()
        found[whole] = generate(trainer, ["w1 w2"], samples=24, max_new_tokens=8, whole=whole, costs=costs)[0]
        cut = costs.counts["cut_responses"]
    left_out = [not new for new in found[True]]
    assert 0 < sum(left_out) == cut < 24
    assert [text for text in found[True] if text] == [
        t for t, out in zip(found[False], left_out, strict=True) if not out
    ]
    assert f"{cut} of 24 responses reached max_new_tokens=8" in caplog.text


# ---- What is left behind ----


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("select_k_of_b", {"factor": 2}),
        ("selective_dpo", {"source": "online", "refresh": 2, "keep": 0.8}),
        ("bees", {"sources": ["implicit"], "refresh": 3, "keep": 0.8}),
    ],
)
def test_a_resumed_run_has_cost_what_the_whole_one_has(make_trainer, tmp_path, name, parameters):
    config = {"save_strategy": "steps", "save_steps": 3, "num_train_epochs": 2}
    summaries = []
    for checkpoint in (None, str(tmp_path / "out" / "checkpoint-6")):
        trainer = make_trainer("dpo", dataset=tiny.preferences(20), **config)
        trainer.add_callback(SelectionCallback(trainer, name, **parameters))
        trainer.train(resume_from_checkpoint=checkpoint)
        summary = json.loads((tmp_path / "out" / "selection" / "summary.json").read_text())["cost"]
        assert summary.pop("seconds") > 0
        summaries.append(summary)
    assert summaries[0] == summaries[1]
    assert summaries[0]["forwards"] > 20
    assert set(WORK) | set(WORK.values()) <= set(summaries[0])


def test_a_second_training_begins_anew(make_trainer):
    trainer = make_trainer("dpo", max_steps=1)
    trainer.add_callback(SelectionCallback(trainer, "infobatch", prescore=True))
    for _ in range(2):
        trainer.train()
        assert trainer.selection.costs.counts["forwards"] == 40
