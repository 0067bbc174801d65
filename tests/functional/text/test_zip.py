import os
import zlib

import numpy as np
import pytest

from dsel_trl.functional.text.zip import BURNT, canonical_example, serialize, zip_rounds, zip_select
from dsel_trl.functional.text.zip_engine import CompressionEngine
from dsel_trl.functional.text.zip_worker import Anchor, Frame

FRAME = Frame(b"[", b", ", b"]")
RNG = np.random.default_rng(0)
WORDS = ["".join(RNG.choice(list("abcdefghijklmnop"), size=6)) for _ in range(400)]


def text(n, rng):
    return " ".join(rng.choice(WORDS, size=n))


def plain_ratio(examples):
    raw = str(examples).encode()
    return len(raw) / len(zlib.compress(raw, 9))


def engine_ratio(examples, serializer="repr"):
    pieces, frame = serialize(examples, serializer)
    with CompressionEngine(pieces, frame) as engine:
        return float(engine.ratios("all", list(range(len(pieces) - 1)), [len(pieces) - 1])[0])


def plain_zip(data, budget, k1, k2, k3):
    """The published loop, one-shot compression throughout; what is gone comes back when the pool runs empty."""
    state = np.array([plain_ratio([x]) for x in data], dtype=np.float32)
    selected = []
    while len(selected) < budget:
        pool = np.argsort(state, kind="stable")[:k1]
        state[pool] = [plain_ratio([data[j] for j in selected] + [data[i]]) for i in pool]
        finalists = sorted(pool.tolist(), key=lambda i: (state[i], i))[:k2]
        state[finalists] = 1e6
        chosen = []
        for _ in range(k3):
            rest = [i for i in finalists if i not in chosen]
            values = np.float32([plain_ratio([data[j] for j in chosen] + [data[i]]) for i in rest])
            chosen.append(min(zip(values, rest, strict=True))[1])
        selected += chosen
    return selected


def pool_of(n, seed=0):
    rng = np.random.default_rng(seed)
    return [canonical_example(i, [("human", text(8, rng)), ("gpt", text(40, rng))], "s") for i in range(n)]


@pytest.mark.parametrize("sizes", [(12, 40, 8, 4), (10, 15, 10, 5), (6, 30, 3, 1)])
def test_equals_the_plain_loop(sizes):
    data = pool_of(60)
    budget, k1, k2, k3 = sizes
    assert zip_select(data, budget, k1=k1, k2=k2, k3=k3).tolist() == plain_zip(data, budget, k1, k2, k3)


def test_the_published_code_chooses_what_is_gone_again():
    rng = np.random.default_rng(5)
    data = [text(30 + 11 * i, rng) for i in range(12)]
    rounds = list(zip_rounds(data, 12, k1=12, k2=6, k3=2, as_published=True))
    assert all((np.diff(np.sort(step.ratios)) > 0).all() for step in rounds)
    assert np.concatenate([step.chosen for step in rounds]).tolist() == plain_zip(data, 12, 12, 6, 2)
    again = list(zip_rounds(data, 36, k1=12, k2=12, k3=12, as_published=True))
    assert np.bincount(np.concatenate([step.chosen for step in again])).tolist() == [3] * 12
    once = next(zip_rounds(data, 3, k1=12, k2=1, k3=3, as_published=True))
    assert once.chosen.tolist() == once.finalists.tolist() * 3


def test_incremental_size_equals_one_shot():
    rng = np.random.default_rng(1)
    anchor, pieces = Anchor(FRAME), []
    for i in range(60):
        piece = rng.integers(97, 105, size=int(rng.integers(0, 6000))).astype(np.uint8).tobytes()
        raw = b"[" + b", ".join([*pieces, piece]) + b"]"
        assert anchor.ratio(piece) == len(raw) / len(zlib.compress(raw, 9))
        anchor.append(i, piece)
        pieces.append(piece)


def test_anchor_is_rebuilt_when_it_does_not_continue():
    pieces, frame = [b"aaaa", b"bbbb", b"cccc"], Frame(b"", b"", b"")
    with CompressionEngine(pieces, frame) as engine:
        first = engine.ratios("all", [0, 1], [2])
        engine.ratios("all", [1], [2])
        assert engine.ratios("all", [0, 1], [2]).tolist() == first.tolist()


def test_ratio():
    data = pool_of(5)
    assert engine_ratio(data) == plain_ratio(data)
    joined = "\n".join(["ä", "", "b"]).encode()
    assert engine_ratio(["ä", "", "b"], "text") == len(joined) / len(zlib.compress(joined, 9))
    assert engine_ratio([{"a": "x"}], lambda example: example["a"]) == 1 / len(zlib.compress(b"x", 9))


def test_no_example_twice_and_rejects_never_return():
    data = pool_of(40)
    rounds = list(zip_rounds(data, 10, k1=40, k2=8, k3=3))
    chosen = np.concatenate([step.chosen for step in rounds])
    finalists = np.concatenate([step.finalists for step in rounds])
    assert len(set(chosen.tolist())) == len(chosen) == 12
    assert len(set(finalists.tolist())) == len(finalists)
    assert (rounds[-1].state[finalists] == BURNT).all()
    assert len(zip_select(data, 10, k1=40, k2=8, k3=3)) == 10
    watched = []
    assert len(zip_select(data, 10, k1=40, k2=8, k3=3, truncate=False, watch=watched.append)) == 12
    assert [step.chosen.tolist() for step in watched] == [step.chosen.tolist() for step in rounds]


def test_restored_rejects_can_be_chosen_later():
    data = pool_of(12)
    with pytest.warns(UserWarning, match="ran empty"):
        assert len(zip_select(data, 12, k2=6, k3=2)) < 12
    assert sorted(zip_select(data, 12, k2=6, k3=2, unchosen="restore").tolist()) == list(range(12))


def test_avoids_near_duplicates():
    rng = np.random.default_rng(3)
    distinct = [text(60, rng) for _ in range(20)]
    copies = [f"{distinct[i % 4]} {i}" for i in range(30)]
    data = distinct + copies
    chosen = zip_select(data, 10, k1=50, k2=10, k3=2, unchosen="restore", serializer="text")
    mine = engine_ratio([data[i] for i in chosen], "text")
    others = [engine_ratio([data[i] for i in rng.permutation(50)[:10]], "text") for _ in range(40)]
    assert mine <= np.quantile(others, 0.1)


def test_ties_go_to_the_lower_id():
    assert zip_select(["same"] * 5, 3, k3=1, unchosen="restore", serializer="text").tolist() == [0, 1, 2]


def test_anchor_counts_as_selected():
    data = pool_of(20)
    first = zip_select(data, 5, k2=5, k3=5)
    second = zip_select(data, 5, k2=5, k3=5, anchor_ids=first.tolist())
    assert not set(first.tolist()) & set(second.tolist())


def test_odd_texts():
    data = ["", "", "\ud800", "日本語" * 30, "e\u0301", "'\"\n"]
    assert sorted(zip_select(data, 6, k3=2, unchosen="restore").tolist()) == list(range(6))
    assert zip_select(data, 6, serializer="text", k2=6, k3=6).shape == (6,)
    with pytest.warns(UserWarning, match="ran empty"):
        assert zip_select([], 3).tolist() == []


def test_workers_change_nothing():
    data = pool_of(60)
    one = list(zip_rounds(data, 12, k1=50, k2=8, k3=4))
    two = list(zip_rounds(data, 12, k1=50, k2=8, k3=4, workers=2))
    for a, b in zip(one, two, strict=True):
        for left, right in zip(a, b, strict=True):
            np.testing.assert_array_equal(left, right)


def test_a_dead_worker_is_an_error_and_leaves_no_file():
    with CompressionEngine([b"a", b"b"], FRAME, workers=2) as engine:
        path = engine._path
        assert os.path.exists(path)
        engine._processes[0].kill()
        engine._processes[0].wait()
        with pytest.raises(RuntimeError, match="ended early"):
            engine.ratios("all", [], [0, 1])
    assert not os.path.exists(path)


def test_serialisation():
    data = [canonical_example(3, [("human", "it's")], "x"), {"a": 1}]
    pieces, frame = serialize(data)
    assert frame.opening + frame.separator.join(pieces) + frame.closing == str(data).encode()


def test_errors_name_the_value():
    with pytest.raises(ValueError, match="k2=0"):
        zip_select(["a"], 1, k2=0)
    with pytest.raises(ValueError, match="forget"):
        zip_select(["a"], 1, unchosen="forget")
    with pytest.raises(ValueError, match="json"):
        zip_select(["a"], 1, serializer="json")
