"""The ledger: written, grown, saved, shown."""

import json

import numpy as np
import pytest

from dsel_trl import Ledger
from dsel_trl.core.sidecar import read_sidecar, write_sidecar


def test_unknown_until_written():
    ledger = Ledger(4)
    ledger.write("loss", [2, 0], [0.5, -1.0], step=3)
    np.testing.assert_array_equal(ledger["loss"], np.float32([-1.0, np.nan, 0.5, np.nan]))
    assert ledger.steps("loss").tolist() == [3, -1, 3, -1]
    assert "loss" in ledger
    assert "margin" not in ledger
    assert len(ledger) == 4


def test_a_missing_score_is_named():
    ledger = Ledger(2)
    ledger.add("loss")
    with pytest.raises(KeyError, match=r"no score 'losss'; it has \['loss'\]"):
        ledger["losss"]


def test_later_values_replace_earlier_ones():
    ledger = Ledger(3)
    ledger.write("loss", [0, 1], [1.0, 2.0], step=1)
    ledger.write("loss", [1, 2], [5.0, 6.0], step=2)
    ledger.write("margin", [0], [9.0], step=7)
    assert ledger["loss"].tolist() == [1.0, 5.0, 6.0]
    assert ledger.steps("loss").tolist() == [1, 2, 2]
    assert ledger.last_step().tolist() == [7, 2, 2]
    ledger.add("loss")
    assert ledger["loss"].tolist() == [1.0, 5.0, 6.0]


def test_all_examples_at_once():
    ledger = Ledger(3)
    ledger.write("score", None, [1, 2, 3], step=0)
    assert ledger["score"].dtype == np.float32
    assert ledger.steps("score").tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="values for a ledger of 3"):
        ledger.write("score", None, [1, 2], step=0)


@pytest.mark.parametrize("ids", [[3], [-1], [0, 99]])
def test_ids_outside_the_dataset_are_refused(ids):
    with pytest.raises(IndexError, match="outside a dataset of 3 rows"):
        Ledger(3).write("loss", ids, np.zeros(len(ids)), step=0)


def test_visits_count_repeats_and_widen():
    ledger = Ledger(3)
    ledger.visit(np.array([0, 0, 2]))
    assert ledger.visits.tolist() == [2, 0, 1]
    assert ledger.visits.dtype == np.uint8
    for _ in range(254):
        ledger.visit(np.array([0]))
    assert ledger.visits.tolist() == [256, 0, 1]
    assert ledger.visits.dtype == np.uint16
    ledger.visit(np.full(70_000, 2))
    assert ledger.visits.tolist() == [256, 0, 70_001]


def test_dropping_says_why_and_can_be_taken_back():
    ledger = Ledger(4)
    assert not ledger.dropped.any()
    ledger.drop(np.array([True, False, False, True]), "margin")
    ledger.drop(np.array([False, True, False, False]), "random")
    assert ledger.dropped.tolist() == [True, True, False, True]
    assert ledger.to_dataset()["dropped_by"][:] == ["margin", "random", "", "margin"]
    ledger.drop(np.array([False, False, True, False]), "margin")
    assert ledger.to_dataset()["dropped_by"][:] == ["", "random", "margin", ""]


def test_memory_of_four_scores():
    ledger = Ledger(100_000)
    for name in "abcd":
        ledger.add(name)
    ledger.drop(np.zeros(100_000, dtype=bool), "a")
    assert ledger.nbytes / 100_000 <= 34


# ---- Streams ----


def test_rows_appear_with_their_ids():
    ledger = Ledger()
    large = 2**62 + 5
    ledger.write("loss", [large, 7], [1.0, 2.0], step=1)
    ledger.visit(np.array([7, 7, 9]))
    assert len(ledger) == 3
    assert ledger["loss"].tolist()[:2] == [1.0, 2.0]
    assert np.isnan(ledger["loss"][2])
    assert ledger.visits[:3].tolist() == [0, 2, 1]
    assert ledger.to_dataset()["id"][:] == [large, 7, 9]


def test_growing_keeps_what_was_written():
    ledger = Ledger()
    ids = np.arange(5000) * 3
    for start in range(0, 5000, 700):
        part = ids[start : start + 700]
        ledger.write("loss", part, part.astype(float), step=start)
        ledger.visit(part)
        ledger.drop(np.arange(len(ledger)) % 2 == 0, "half")
        ledger.decide("half", part, part / 2, start)
    assert len(ledger) == 5000
    assert ledger["loss"].tolist() == ids.tolist()
    assert ledger.visits[:5000].tolist() == [1] * 5000
    assert ledger.dropped.sum() == 2500
    decisions = ledger.decisions()
    assert decisions["score"].tolist() == (ids / 2).tolist()
    assert set(decisions["decider"]) == {"half"}
    assert (decisions["step"] == (np.arange(5000) // 700) * 700).all()
    assert (ledger.steps("loss") == (np.arange(5000) // 700) * 700).all()
    # Rows that are free yet are in the arrays, but not in the ledger.
    assert len(ledger.visits) > 5000


@pytest.mark.parametrize("size", [6, None])
def test_saved_and_taken_back(size, tmp_path):
    ledger = Ledger(size)
    ledger.write("loss", [5, 1], [0.1, np.nan], step=4)
    ledger.visit(np.array([5, 5, 1, 0]))
    ledger.drop(np.arange(len(ledger)) == 1, "why")
    ledger.decide("why", np.array([1, 0]), np.array([0.5, np.nan]), 7, "scores from 1 up are kept")
    arrays, values = ledger.state_dict()
    write_sidecar(tmp_path / "selection", arrays, {"ledger": values})
    read, read_values = read_sidecar(tmp_path / "selection")
    other = Ledger(size)
    other.load_state_dict(read, read_values["ledger"])
    assert other.state_dict()[1] == values
    for name, array in other.state_dict()[0].items():
        np.testing.assert_array_equal(array, arrays[name])
    assert other.to_dataset().to_pandas().equals(ledger.to_dataset().to_pandas())
    # What was taken back goes on growing on its own.
    other.write("loss", [3], [9.0], step=5)
    assert np.isnan(ledger["loss"]).sum() == len(ledger) - 1


def test_a_ledger_of_another_size_is_refused():
    arrays, values = Ledger(5).state_dict()
    with pytest.raises(ValueError, match="of 5 examples, this dataset has 4"):
        Ledger(4).load_state_dict(arrays, values)


def test_shown_with_the_users_ids():
    ledger = Ledger(2)
    ledger.write("loss", [1], [0.25], step=6)
    table = ledger.to_dataset(np.array([10, 30]))
    decision = {"decided_by": "", "decision_score": pytest.approx(float("nan"), nan_ok=True), "decision_step": -1}
    assert table[1] == {
        "id": 30, "loss": 0.25, "visits": 0, "last_step": 6, "dropped_by": "", **decision, "reason": "",
    }  # fmt: skip


# ---- What decided ----


def test_what_decided_is_held_of_examples_that_were_never_visited():
    ledger = Ledger(4)
    ledger.decide("margin", None, np.array([0.5, -1.0, np.nan, 2.0]), 3, "scores from 0.5 up are kept")
    ledger.drop(np.array([False, True, True, False]), "margin")
    ledger.visit(np.array([0]))
    table = ledger.to_dataset()
    assert table["dropped_by"][:] == ["", "margin", "margin", ""]
    assert table["decided_by"][:] == ["margin"] * 4
    np.testing.assert_array_equal(table["decision_score"][:], [0.5, -1.0, np.nan, 2.0])
    assert table["decision_step"][:] == [3] * 4
    why = "margin: scores from 0.5 up are kept"
    # The last one was kept, and not reached yet.
    assert table["reason"][:] == ["", why, why, ""]
    assert ledger.nbytes == 4 * (1 + 1 + 9)


def test_a_candidate_that_was_never_picked_has_a_reason_and_is_not_dropped():
    ledger = Ledger(3)
    ledger.decide("jest", np.array([2, 0]), np.array([0.1, 0.7]), 5, "not picked among candidates", picks=True)
    ledger.visit(np.array([0]))
    table = ledger.to_dataset()
    assert table["dropped_by"][:] == [""] * 3
    assert table["reason"][:] == ["", "", "jest: not picked among candidates"]
    assert table["decision_step"][:] == [5, -1, 5]


# ---- The sidecar's files ----


def test_a_sidecar_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    folder = tmp_path / "selection"
    write_sidecar(folder, {"a": np.arange(3)}, {"n": 1, "nan": float("nan"), "keys": {1: (2, 3)}})
    arrays, values = read_sidecar(folder)
    assert arrays["a"].tolist() == [0, 1, 2]
    assert values["keys"] == {"1": [2, 3]}
    assert sorted(path.name for path in folder.iterdir()) == ["state.json", "state.safetensors"]

    def fails(*args):
        raise OSError("disk full")

    monkeypatch.setattr("dsel_trl.core.sidecar.write_json", fails)
    with pytest.raises(OSError, match="disk full"):
        write_sidecar(folder, {"a": np.arange(4)}, {"n": 2})
    with pytest.raises(ValueError, match=r"state\.json is missing"):
        read_sidecar(folder)


def test_a_sidecar_of_arrays_of_another_save_is_refused(tmp_path):
    write_sidecar(tmp_path / "one", {"a": np.arange(3)}, {"n": 1})
    write_sidecar(tmp_path / "two", {"a": np.arange(1, 4)}, {"n": 1})
    (tmp_path / "two" / "state.safetensors").replace(tmp_path / "one" / "state.safetensors")
    with pytest.raises(ValueError, match=r"state\.safetensors was cut short or changed"):
        read_sidecar(tmp_path / "one")


def test_json_that_is_no_mapping_is_refused(tmp_path):
    write_sidecar(tmp_path / "s", {}, {})
    (tmp_path / "s" / "state.json").write_text(json.dumps([1, 2]))
    with pytest.raises(ValueError, match="not a selection state of format 1"):
        read_sidecar(tmp_path / "s")
