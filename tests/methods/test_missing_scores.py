"""Scores that are missing or equal: unknown never comes before known, and nothing is decided silently."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, Features, Value

from tests import tiny


def scored(chosen, rejected):
    """Pairs with these scores, null where `None`."""
    rows = tiny.preferences(len(chosen)).remove_columns(["score_chosen", "score_rejected"])
    features = Features({**rows.features, "score_chosen": Value("float64"), "score_rejected": Value("float64")})
    columns = {name: list(rows[name]) for name in rows.column_names}
    return Dataset.from_dict({**columns, "score_chosen": chosen, "score_rejected": rejected}, features=features)


def trained(make_trainer, dataset, method, **parameters):
    trainer = make_trainer("dpo", dataset=dataset, num_train_epochs=2)
    witness = tiny.attach(trainer, method, **parameters)
    trainer.train()
    return trainer, {i for ids in witness.ids for i in ids}


# 1/0 judgements of 24 pairs: every third is missing.
JUDGED = [None if i % 3 == 0 else 1.0 for i in range(24)]
ZERO = [None if i % 3 == 0 else 0.0 for i in range(24)]
KNOWN = {i for i in range(24) if i % 3}
MIXED = [None if i % 3 == 0 else float(i % 2) for i in range(24)]


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("margin", {"source": "explicit", "keep": 0.5}),
        ("margin", {"source": "explicit", "action": "keep_bottom", "keep": 0.5}),
        ("margin", {"source": "explicit", "action": "band"}),
        ("margin", {"source": "explicit", "action": "sample", "keep": 0.5}),
        ("margin", {"source": "explicit", "action": "curriculum", "keep": 0.5}),
        ("margin", {"source": "explicit", "action": "curriculum"}),
        ("margin", {"source": "disagreement", "keep": 0.5, "refresh": 2}),
        ("alignment_potential", {"keep": 0.5}),
        ("bees", {"sources": ["explicit"], "keep": 0.5}),
        ("bees", {"sources": ["explicit"], "action": "sample", "keep": 0.5}),
        ("curriculum", {"by": "column", "column": "score_chosen", "action": "keep_top"}),
        ("curriculum", {"by": "column", "column": "score_chosen"}),
        ("selective_dpo", {"source": "column", "column": "score_chosen"}),
        ("selective_dpo", {"source": "column", "column": "score_chosen", "order_mode": "hard_first"}),
    ],
)
@pytest.mark.parametrize("scores", [JUDGED, MIXED], ids=["all alike", "1 and 0"])
def test_a_pair_without_a_score_is_never_trained(make_trainer, method, parameters, scores):
    _, ids = trained(make_trainer, scored(scores, ZERO), method, **parameters)
    assert ids
    assert ids <= KNOWN


def test_a_constant_score_is_a_warning_once_and_in_the_summary(make_trainer, caplog):
    with caplog.at_level(logging.INFO, logger="dsel_trl"):
        trainer, ids = trained(make_trainer, scored(JUDGED, ZERO), "margin", source="explicit", keep=0.5, refresh=2)
    warnings = [record for record in caplog.records if "all 16 known scores are 1" in record.getMessage()]
    assert len(warnings) == 1
    assert warnings[0].levelno == logging.WARNING
    summary = json.loads((Path(trainer.args.output_dir) / "selection" / "summary.json").read_text())
    assert [note for note in summary["notes"] if "'margin'" in note and "drawn at random (seed 42)" in note]
    assert ids <= KNOWN


def test_ties_are_a_draw_that_is_said(make_trainer, caplog):
    chosen = [1.0] * 20 + [5.0] * 4
    with caplog.at_level(logging.INFO, logger="dsel_trl"):
        trainer, ids = trained(make_trainer, scored(chosen, [0.0] * 24), "margin", source="explicit", keep=0.5)
    assert {20, 21, 22, 23} <= ids
    rest = sorted(ids - {20, 21, 22, 23})
    assert len(rest) == 8
    assert rest != list(range(8)), "the first rows of the file do not win"
    assert [record for record in caplog.records if "24 of 24 known scores are shared" in record.getMessage()]
    assert trainer.state.log_history[0]["selection/margin_tied"] == 24


def test_another_seed_draws_others(make_trainer):
    kept = []
    for seed in (1, 2):
        trainer = make_trainer("dpo", dataset=scored([1.0] * 24, [0.0] * 24), data_seed=seed)
        witness = tiny.attach(trainer, "margin", source="explicit", keep=0.5)
        trainer.train()
        kept.append({i for ids in witness.ids for i in ids})
    assert all(len(ids) == 12 for ids in kept)
    assert kept[0] != kept[1]


def test_the_loss_decides_between_pairs_learned_at_the_same_step(make_trainer, tmp_path):
    """All pairs of a table were learned at one step: the easiest half by loss is kept, not the first half."""
    losses = np.random.default_rng(0).permutation(24) / 24
    table = {"id": list(range(24)), "learned_step": [3] * 24, "learning_order": losses.tolist()}
    (tmp_path / "table.json").write_text(json.dumps(table))
    parameters = {"source": "table", "table": str(tmp_path / "table.json"), "criterion_by": "learned_step"}
    _, ids = trained(make_trainer, tiny.preferences(24), "selective_dpo", **parameters)
    assert ids == set(np.argsort(losses)[:12].tolist())
