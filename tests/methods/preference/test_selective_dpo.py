"""SelectiveDPO: difficulty of helper models and tables, criteria, and the order modes."""

import csv

import numpy as np
import pytest

from dsel_trl import SelectionCallback, create_method
from dsel_trl.core.randomness import stream_seed
from dsel_trl.data.difficulty_table import prompt_ids, read_table, write_table
from tests import tiny


def served(make_trainer, **parameters):
    trainer = make_trainer("dpo")
    witness = tiny.attach(trainer, "selective_dpo", source="column", **parameters)
    trainer.train()
    return np.array([i for ids in witness.ids for i in ids])


HARD = np.array(tiny.preferences()["difficulty"])


def test_order_modes(make_trainer):
    easiest = np.argsort(HARD)[:20]
    np.testing.assert_array_equal(served(make_trainer), easiest)
    np.testing.assert_array_equal(served(make_trainer, order_mode="hard_first"), easiest[::-1])
    mixed = served(make_trainer, order_mode="random")
    assert set(mixed) == set(easiest)
    assert mixed.tolist() != easiest.tolist()
    paced = served(make_trainer, order_mode="linear_pacing")
    assert set(paced) == set(easiest)
    ranks = np.argsort(np.argsort(HARD))
    assert ranks[paced[:7]].mean() < ranks[paced[7:]].mean() - 3


@pytest.mark.parametrize(("helpers", "known"), [(1, 20), (2, 40)])
def test_helpers_and_their_table(make_trainer, tmp_path, helpers, known):
    trainer = make_trainer("dpo", max_steps=1)
    parameters = {"helpers": helpers, "evaluations": 2, "helper_lora": False, "helper_learning_rate": 2e-2}
    callback = SelectionCallback(trainer, "selective_dpo", keep=0.5, **parameters)
    trainer.train()
    assert np.isfinite(callback.ledger["selective_dpo"]).sum() == known
    with (tmp_path / "out" / "selection" / "difficulty.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == known
    row = rows[3]
    seed = stream_seed(trainer.selection.run.seed, "selective_dpo/helper", 0)
    losses = [float(row[f"loss_step{step}_seed{seed}"]) for step in range(2)]
    assert float(row["learning_order"]) == pytest.approx(np.mean(losses), rel=1e-5)
    assert -callback.ledger["selective_dpo"][int(row["id"])] == pytest.approx(float(row["learning_order"]), rel=1e-5)
    assert 0 <= float(row["learned_step"]) <= 2

    table = str(tmp_path / "out" / "selection" / "difficulty.csv")
    again = make_trainer("dpo", max_steps=1, output_dir=tmp_path / "again")
    other = SelectionCallback(again, "selective_dpo", source="table", table=table, keep=0.5)
    again.train()
    np.testing.assert_allclose(other.ledger["selective_dpo"], callback.ledger["selective_dpo"], rtol=1e-5)


def test_one_helper_leaves_half_of_the_pairs_unseen_and_says_so(make_trainer, tmp_path):
    for helpers in (1, 2):
        trainer = make_trainer("dpo", max_steps=1, output_dir=tmp_path / str(helpers))
        callback = SelectionCallback(trainer, "selective_dpo", helpers=helpers, evaluations=1, helper_lora=False)
        trainer.train()
        said = [note for note in callback.metrics_window.notes.values() if "helpers=1" in note]
        assert len(said) == (helpers == 1)


@pytest.mark.parametrize(("epochs", "last"), [(1, 18), (2, 20)])
def test_the_last_scoring_is_one_that_a_plan_can_follow(make_trainer, epochs, last):
    """After the step before the last the loader has the ids of the last step already."""
    trainer = make_trainer("dpo", num_train_epochs=epochs, max_steps=-1, per_device_train_batch_size=1)
    callback = SelectionCallback(trainer, "selective_dpo", source="online", refresh=1, keep=0.5)
    trainer.train()
    assert callback.ledger.steps("selective_dpo").max() == last
    expected = callback.methods.methods[0].expected_cost(callback.run)
    # Before the policy has moved the margins say nothing, but they are measured.
    assert callback.costs.counts["forwards"] == expected["forwards"][0]


def test_learned_step_as_the_criterion(make_trainer):
    trainer = make_trainer("dpo", max_steps=1)
    parameters = {"evaluations": 4, "helper_lora": False, "helper_learning_rate": 2e-2, "criterion_by": "learned_step"}
    callback = SelectionCallback(trainer, "selective_dpo", keep=0.5, **parameters)
    trainer.train()
    steps = callback.ledger["selective_dpo_learned_step"]
    np.testing.assert_array_equal(-callback.ledger["selective_dpo"], steps)
    kept = ~callback.ledger.dropped
    assert steps[kept].max() <= steps[~kept].min()


@pytest.mark.parametrize("suffix", [".csv", ".json"])
def test_a_table_follows_its_prompts(tmp_path, suffix):
    data = tiny.preferences()
    values = np.arange(40.0)
    values[5] = np.nan
    path = tmp_path / f"table{suffix}"
    write_table(path, data, {"learning_order": values})
    np.testing.assert_array_equal(read_table(path, data), values)
    shuffled = data.shuffle(seed=1)
    where = {key: i for i, key in enumerate(prompt_ids(data))}
    expected = values[[where[key] for key in prompt_ids(shuffled)]]
    np.testing.assert_array_equal(read_table(path, shuffled), expected)


def test_a_table_by_prompt_id_only(tmp_path):
    data = tiny.preferences().add_column("prompt_id", [f"p{i // 2}" for i in range(40)])
    path = tmp_path / "curriculum.csv"
    path.write_text("prompt_id,loss_step0_seed41,learning_order\np0,0.3,0.25\np3,0.1,\np7,0.2,0.5\np7,9,9\n")
    found = read_table(path, data)
    assert found[[0, 1]].tolist() == [0.25, 0.25]
    assert np.isnan(found[6])
    assert found[[14, 15]].tolist() == [0.5, 0.5]
    assert np.isfinite(found).sum() == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "learning_order"),
        ("id,learning_order\n99,1\n", "names the pair 99"),
        ("prompt_id,learning_order\nnobody,1\n", "none of its 1 prompts"),
        ("id,learning_order\n1,x\n", "could not convert"),
    ],
)
def test_what_is_no_table(tmp_path, text, message):
    path = tmp_path / "table.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_table(path, tiny.preferences())


def test_wrong_parameters():
    for parameters in ({"helpers": 3}, {"criterion_by": "steps"}, {"order_mode": "easy"}, {"source": "table"}):
        with pytest.raises(
            ValueError, match=next(iter(parameters.values())).__repr__() if "source" not in parameters else "both"
        ):
            create_method("selective_dpo", **parameters)
