"""KTO: what the tap reads is what TRL computed, weights are exact, and batches of our own are paired as TRL's are."""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from dsel_trl import Method, SelectionCallback, create_method
from dsel_trl.data.tokens import Sequences
from dsel_trl.functional.kto_losses import KTO_LOSSES
from dsel_trl.signals.batch import Forward, Signal
from dsel_trl.signals.kto_batch import KTOBatch
from dsel_trl.trainer.forwards import fused_head
from tests import tiny, weighted
from tests.signals.test_gate import STEP, TOLERANCE
from tests.signals.test_tap import looked


def stirred(trainer):
    """A trainer whose KL term will not be zero: adapters of rank 4 must move further for that than the whole model."""
    if hasattr(trainer.model, "peft_config"):
        tiny.stir(trainer, scale=0.1)
    return trainer


# ---- Signals ----


SETTINGS = {
    **{name: {"loss_type": name} for name in KTO_LOSSES},
    "weights": {"desirable_weight": 0.6, "undesirable_weight": 1.4, "beta": 0.5},
    "lora": {"lora": True},
    "precomputed": {"precompute_ref_log_probs": True},
    "lora_precomputed": {"lora": True, "precompute_ref_log_probs": True},
    "truncated": {"max_length": 9},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_values_are_those_that_trl_logs(make_trainer, name):
    batches, rows = looked(make_trainer("kto", per_device_train_batch_size=4, max_steps=4, **SETTINGS[name]))
    assert len(batches) == len(rows) == 4
    # Without the fused head, the same log-probabilities are summed from logits in another order.
    rounding = 1e-6 if fused_head() else 4e-6
    for batch, row in zip(batches, rows, strict=True):
        assert isinstance(batch, KTOBatch)
        assert float(batch.settings.kl) == pytest.approx(row["kl"], rel=1e-5, abs=rounding)
        assert float(batch.loss.mean()) == pytest.approx(row["loss"], rel=2e-5)
        for side, of_side, sign in (("chosen", batch.desirable, 1), ("rejected", ~batch.desirable, -1)):
            if of_side.any():
                reward = float(batch.rewards[of_side].mean())
                assert reward == pytest.approx(row[f"rewards/{side}"], rel=2e-5, abs=2e-6)
                assert sign * float(batch.implicit_margin[of_side].mean()) == pytest.approx(reward)
                assert float(batch.policy_logps[of_side].mean()) == pytest.approx(row[f"logps/{side}"], rel=1e-5)
        assert batch.loss.shape == batch.implicit_margin.shape == batch.lengths.shape == (4,)
        assert batch.implicit_margin.abs().max() > 1e-3
    estimates_kl = SETTINGS[name].get("loss_type", "kto") == "kto"
    assert (max(row["kl"] for row in rows) > 0.05) == estimates_kl


def test_lengths_are_those_of_the_rows(make_trainer):
    trainer = make_trainer("kto", max_length=9, max_steps=1, per_device_train_batch_size=4)
    (batch,), _ = looked(trainer)
    run, ids = trainer.selection.run, batch.ids.numpy()
    np.testing.assert_array_equal(run.lengths[ids], batch.lengths)
    np.testing.assert_array_equal(run.completion_lengths[ids], batch.token_mask.sum(dim=1))
    assert (run.lengths == 9).any()


def test_paired_data_becomes_one_example_per_response(make_trainer):
    pairs = tiny.preferences(6).add_column("example_id", np.arange(6))
    trainer = make_trainer("kto", dataset=pairs, max_steps=3)
    callback = SelectionCallback(trainer, "weight_column")
    trainer.train()
    assert len(callback.ledger) == 12
    assert callback.ledger.visits.tolist() == [1] * 6 + [0] * 6
    assert trainer.train_dataset["example_id"] == [*range(6)] * 2


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_an_extra_pass_takes_the_kl_term_of_the_batch_trained_last(make_trainer, lora):
    config = {"lora": lora, "max_steps": 1, "learning_rate": 0.0, "per_device_train_batch_size": 3}
    trainer = stirred(make_trainer("kto", **config))
    batches, rows = looked(trainer)
    assert rows[-1]["kl"] > 0.05
    passes, last = trainer.selection.run.passes, batches[-1]
    metrics = {key: dict(values) for key, values in trainer._metrics.items()}
    losses = passes.measure(lambda batch: batch.loss, last.ids.numpy())
    np.testing.assert_allclose(losses, last.loss, rtol=1e-4)
    margins = passes.measure(lambda batch: batch.implicit_margin, last.ids.numpy())
    np.testing.assert_allclose(margins, last.implicit_margin, rtol=1e-3, atol=1e-4)
    assert {key: dict(values) for key, values in trainer._metrics.items()} == metrics


def test_a_pass_over_sequences_gives_the_tokens_that_are_trained(make_trainer):
    trainer = make_trainer("kto", max_length=9, max_steps=1, learning_rate=0.0, per_device_train_batch_size=4)
    (batch,), _ = looked(trainer)
    run = trainer.selection.run
    sequences = Sequences(run.rows)
    values = run.passes.measure(
        lambda scored: torch.stack([scored.policy_logps, scored.lengths], dim=1),
        batch.ids.numpy(),
        inputs=sequences.collate(),
        lengths=sequences.scan()[0],
    )
    np.testing.assert_allclose(values[:, 0], batch.policy_logps, rtol=1e-4)
    np.testing.assert_array_equal(values[:, 1], batch.token_mask.sum(dim=1))


def test_weights_per_row_and_token():
    mask = torch.tensor([[0, 1, 1, 0], [0, 0, 1, 1]])
    inputs = {"completion_mask": mask, "label": torch.tensor([True, False])}
    batch = KTOBatch(torch.arange(2), inputs, Forward(-torch.ones(2, 3)), Forward(torch.zeros(2, 3)))
    rows, tokens = torch.tensor([2.0, 0.5]), torch.arange(6.0).view(2, 3)
    assert batch.row_weights(rows) is rows
    assert batch.example_weights(rows) is rows
    # Means over the completion tokens of each row.
    assert batch.example_weights(batch.row_weights(tokens)).tolist() == [0.5, 4.5]
    assert batch.implicit_margin.tolist() == pytest.approx([-0.2, 0.2])
    alone = KTOBatch(torch.arange(2), inputs, Forward(-torch.ones(2, 3)))
    with pytest.raises(ValueError, match="scored without its reference"):
        _ = alone.loss


# ---- Weights ----


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("precomputed", [False, True], ids=["live", "precomputed"])
@pytest.mark.parametrize("loss_type", KTO_LOSSES)
def test_every_kto_loss(make_trainer, loss_type, precomputed, lora):
    config = {**STEP, "loss_type": loss_type, "lora": lora, "precompute_ref_log_probs": precomputed}
    outcome = weighted.compare(stirred(make_trainer("kto", **config)))
    assert outcome.error < TOLERANCE
    assert (outcome.logs["kl"] > 0.05) == (loss_type == "kto")


@pytest.mark.parametrize(
    "config",
    [
        {"gradient_checkpointing": True},
        {"desirable_weight": 0.6, "undesirable_weight": 1.4, "beta": 0.5},
        {"gradient_accumulation_steps": 2},
        {"max_length": 9},
    ],
    ids=["checkpointing", "sides", "accumulated", "truncated"],
)
def test_every_way_to_change_it(make_trainer, config):
    assert weighted.compare(make_trainer("kto", **STEP, **config), normalize="mean1").error < TOLERANCE


def test_the_comparison_sees_the_kl_term(make_trainer, monkeypatch):
    """The explicit gradient at another KL term is far away: the tests above can fail by it."""
    outcome = weighted.compare(make_trainer("kto", **STEP))
    stock = weighted.explicit_gradient
    turned = lambda trainer, batches, weights: stock(  # noqa: E731
        trainer, [{**batch, "KL_input_ids": batch["KL_input_ids"].flip(1)} for batch in batches], weights
    )
    monkeypatch.setattr(weighted, "explicit_gradient", turned)
    other = weighted.compare(make_trainer("kto", **STEP))
    outcome.explicit = other.explicit
    assert outcome.error > 1e-4


# ---- Stock ----


@pytest.mark.parametrize("method", ["uniform", "ones"])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"loss_type": "apo_zero_unpaired", "train_sampling_strategy": "random"},
        {"gradient_accumulation_steps": 2, "lora": True},
        {"precompute_ref_log_probs": True, "num_train_epochs": 2},
    ],
    ids=["plain", "random", "lora_accumulated", "precomputed"],
)
def test_neutral_is_stock_bit_for_bit(make_trainer, config, method):
    config = {"dataset": tiny.judged(9), **config}
    stock, other = make_trainer("kto", **config), make_trainer("kto", **config)
    ones = weighted.FixedWeights(np.ones(9, dtype=np.float32))
    other.add_callback(SelectionCallback(other, ones if method == "ones" else method))
    for trainer in (stock, other):
        trainer.train()
    assert tiny.losses_of(other) == tiny.losses_of(stock)
    tiny.assert_same_weights(tiny.weights_of(other), tiny.weights_of(stock))


def test_evaluation_passes_through(make_trainer):
    config = {"eval_strategy": "epoch", "eval_dataset": tiny.judged(8, seed=7), "max_steps": 3}
    stock, other = make_trainer("kto", **config), make_trainer("kto", **config)
    SelectionCallback(other, "weight_column", column="one")
    for trainer in (stock, other):
        trainer.train()
    assert tiny.losses_of(other) == tiny.losses_of(stock)


def test_listening_runs_no_forward(make_trainer):
    def forwards(method):
        trainer, count = make_trainer("kto", max_steps=2), [0]
        for model in (trainer.model, trainer.ref_model):
            model.model.register_forward_pre_hook(lambda *args: count.__setitem__(0, count[0] + 1))
        if method:
            SelectionCallback(trainer, method)
        trainer.train()
        return count[0]

    assert forwards("dr_dpo") == forwards(None) == 8


@dataclass
class OwnBeta(Method):
    """Trains each batch with a beta of its own, and looks at the batch before it does."""

    beta: float = 0.4

    name = "own_beta"
    trainers = ("kto",)

    def adjust(self, run, batch):
        assert torch.isfinite(batch.loss).all()
        return {"beta": self.beta}


@pytest.mark.parametrize(
    "config", [{}, {"lora": True}, {"precompute_ref_log_probs": True}, {"loss_type": "apo_zero_unpaired"}]
)
def test_the_trainer_is_adjusted_once_all_forwards_are_read(make_trainer, config):
    stock, other = make_trainer("kto", max_steps=3, beta=0.4, **config), make_trainer("kto", max_steps=3, **config)
    SelectionCallback(other, OwnBeta())
    for trainer in (stock, other):
        trainer.train()
    tiny.assert_same_weights(tiny.weights_of(other), tiny.weights_of(stock))


# ---- Batches of our own ----


def completions_of(rows, prefix=""):
    """The completion tokens of each row of a collated batch."""
    ids, masks = rows[f"{prefix}input_ids"], rows[f"{prefix}completion_mask"]
    return [row[mask == 1].tolist() for row, mask in zip(ids, masks, strict=True)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("method", [("random", {"keep": 0.6}), ("select_k_of_b", {"by": "implicit_margin"})])
def test_rows_that_are_served_together_lend_each_other_their_completions(make_trainer, method, workers):
    trainer = make_trainer("kto", per_device_train_batch_size=3, max_steps=4, dataloader_num_workers=workers)
    name, parameters = method
    keep = weighted.FixedWeights(np.ones(40, dtype=np.float32))
    SelectionCallback(trainer, [create_method(name, **parameters), keep])
    trainer.train()
    served = [micro["ids"].tolist() for micro in keep.seen]
    assert served != [list(range(start, start + 3)) for start in (0, 3, 6, 9)]
    for micro in keep.seen:
        own, lent = completions_of(micro["inputs"]), completions_of(micro["inputs"], "KL_")
        assert lent == own[-1:] + own[:-1]


def test_the_order_of_the_dataset_keeps_its_own_pairs(make_trainer):
    trainer = make_trainer("kto", dataset=tiny.judged(10), per_device_train_batch_size=4)
    # Prepared by several processes, the pairs are not those of the batches.
    others = trainer.train_dataset["completion_ids"][::-1]
    trainer.train_dataset = trainer.train_dataset.remove_columns("KL_completion_ids").add_column(
        "KL_completion_ids", others
    )
    keep = weighted.FixedWeights(np.ones(10, dtype=np.float32))
    SelectionCallback(trainer, keep)
    trainer.train()
    assert [micro["ids"].tolist() for micro in keep.seen] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    for micro in keep.seen:
        assert completions_of(micro["inputs"], "KL_") == [others[i] for i in micro["ids"].tolist()]


@pytest.mark.parametrize("method", ["random", "select_k_of_b", "infobatch", "length_curriculum"])
def test_precomputed_references_of_the_kl_term_fit_no_other_batches(make_trainer, method):
    trainer = make_trainer("kto", precompute_ref_log_probs=True)
    with pytest.raises(ValueError, match=rf"precompute_ref_log_probs=True.*'{method}'.*apo_zero_unpaired"):
        SelectionCallback(trainer, method)
    trainer = make_trainer("kto", precompute_ref_log_probs=True, loss_type="apo_zero_unpaired", max_steps=2)
    SelectionCallback(trainer, method)
    trainer.train()
    assert trainer.state.global_step == 2


def test_a_wish_for_another_order_is_refused(make_trainer):
    config = {"loss_type": "apo_zero_unpaired", "train_sampling_strategy": "group_by_length"}
    with pytest.raises(ValueError, match=r"'group_by_length' orders.*\['random'\]: .* at 'sequential'"):
        SelectionCallback(make_trainer("kto", **config), "random")


# ---- Methods ----


@pytest.mark.parametrize("name", ["alignment_potential", "beta_dpo", "wpo", "token_budget", "rho1"])
def test_what_is_no_method_of_labelled_responses(make_trainer, name):
    parameters = {"clean_column": "one"} if name == "rho1" else {}
    with pytest.raises(ValueError, match=rf"'{name}' works with .*, not with KTOTrainer"):
        SelectionCallback(make_trainer("kto"), name, **parameters)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("margin", {"source": "explicit", "reward": "tests.contract.cases:fewest_words"}),
        ("select_k_of_b", {"by": "explicit_margin", "reward": "tests.contract.cases:fewest_words"}),
    ],
)
def test_there_is_no_second_response(make_trainer, name, parameters):
    trainer = make_trainer("kto")
    SelectionCallback(trainer, name, **parameters)
    with pytest.raises(ValueError, match=r"'?explicit(_margin)?'? (compares|needs)"):
        trainer.train()


def test_margins_choose_what_the_policy_disagrees_with(make_trainer):
    trainer = make_trainer("kto", num_train_epochs=2)
    callback = SelectionCallback(trainer, "margin", source="implicit", action="keep_bottom", keep=0.5)
    trainer.train()
    assert np.isfinite(callback.ledger["margin"]).any()
    assert callback.ledger.dropped.sum() == 20


@dataclass
class PickByLoss(Method):
    """Trains on the half of twice as many candidates with the larger loss; keeps the KL terms it saw."""

    kl: list = field(default_factory=list, init=False)

    name = "pick_by_loss"
    trainers = ("kto",)
    signals = (Signal.LOSS,)

    @property
    def candidates(self):
        return 2

    def pick(self, run, candidates):
        self.kl.append(float(candidates.settings.kl))
        return candidates.loss.argsort(descending=True, stable=True)[: candidates.size // 2]


def test_candidates_are_compared_at_the_same_kl_term_after_a_resume(make_trainer, tmp_path):
    config = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "output_dir": tmp_path / "whole"}
    traces, kl = [], []
    for resume in (None, str(tmp_path / "whole" / "checkpoint-1")):
        trainer, method = make_trainer("kto", per_device_train_batch_size=3, **config), PickByLoss()
        if resume is None:
            tiny.stir(trainer)
        witness = tiny.attach(trainer, method)
        trainer.train(resume_from_checkpoint=resume)
        traces.append(tiny.Trace.of(trainer, witness))
        kl.append(method.kl)
    whole, resumed = kl
    assert whole[0] == 0
    assert whole[1] > 0.05
    assert resumed == whole[1:]
    traces[1].assert_ends_as(traces[0])
