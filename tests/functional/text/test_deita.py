import numpy as np
import pytest
import torch

from dsel_trl.functional.text.deita import (
    LLAMA_DIGIT_IDS,
    conversation_scores,
    digit_logits,
    diversity_filter,
    expected_digit,
)


def plain_greedy(scores, embeddings, threshold):
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    kept = []
    for i in np.argsort(-scores, kind="stable"):
        if not kept or (unit[kept] @ unit[i]).max() <= threshold:
            kept.append(int(i))
    return kept


def test_expected_digit_by_hand():
    p = np.array([1, 2, 3, 4, 5, 6]) / 21
    assert expected_digit(np.log(p)) == pytest.approx((p * np.arange(1, 7)).sum())
    assert expected_digit([[0, -np.inf, -np.inf, -np.inf, -np.inf, -np.inf], [-1e4, 0, 0, 0, 0, 900]]).tolist() == [
        1,
        6,
    ]


def test_expected_digit_is_shift_invariant_and_bounded():
    logits = np.random.default_rng(0).normal(scale=30, size=(50, 6))
    scores = expected_digit(logits)
    np.testing.assert_allclose(scores, expected_digit(logits + 123.0))
    assert ((scores >= 1) & (scores <= 6)).all()


def test_missing_digit():
    logits = torch.full((2, 30_000), torch.nan)
    logits[:, list(LLAMA_DIGIT_IDS)] = -1.0
    logits[1, LLAMA_DIGIT_IDS[2]] = torch.nan
    digits = digit_logits(logits, LLAMA_DIGIT_IDS)
    assert expected_digit(digits).tolist() == pytest.approx([3.5, 3.0])
    assert expected_digit(digits[1], fallback=2.0) == 2.0
    assert digit_logits(torch.arange(9.0), [3, 1]).tolist() == [3.0, 1.0]
    assert expected_digit(np.full(6, -np.inf)) == 3.0


def test_conversation_scores():
    c, q = [[2.0, 3.0], [], [4.0]], [[1.0, 5.0], [], [0.5]]
    assert conversation_scores(c, q).tolist() == [17.0, 0.0, 2.0]
    assert conversation_scores([[3.0, 2.0]], [[5.0, 1.0]]) == conversation_scores([[2.0, 3.0]], [[1.0, 5.0]])
    assert conversation_scores(c).tolist() == [5.0, 0.0, 4.0]


def test_conversation_scores_do_not_depend_on_the_order_of_the_turns():
    rng = np.random.default_rng(0)
    turns = [rng.uniform(1, 6, size=(2, n)) for n in rng.integers(0, 6, size=30)]
    shuffled = [rng.permutation(pair, axis=1) for pair in turns]
    scores, again = (conversation_scores(*zip(*rows, strict=True)) for rows in (turns, shuffled))
    np.testing.assert_allclose(scores, again)
    np.testing.assert_allclose(scores, [(pair[0] * pair[1]).sum() for pair in turns])


@pytest.mark.parametrize("block_size", [1, 2, 7, 1024])
@pytest.mark.parametrize("threshold", [0.3, 0.7, 0.95])
def test_equals_the_plain_greedy_filter(block_size, threshold):
    rng = np.random.default_rng(0)
    embeddings, scores = rng.standard_normal((300, 4)), rng.standard_normal(300)
    got = diversity_filter(scores, embeddings, threshold=threshold, block_size=block_size)
    assert got.tolist() == plain_greedy(scores, embeddings, threshold)
    assert diversity_filter(scores, embeddings, threshold=threshold, size=5).tolist() == got[:5].tolist()


def test_kept_pairs_are_unlike_and_dropped_ones_have_a_kept_neighbour():
    rng = np.random.default_rng(1)
    embeddings, scores = rng.standard_normal((200, 3)), rng.standard_normal(200)
    kept = diversity_filter(scores, embeddings, threshold=0.8)
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    inside = unit[kept] @ unit[kept].T - 2 * np.eye(len(kept))
    assert inside.max() <= 0.8 + 1e-6
    dropped = np.setdiff1d(np.arange(200), kept)
    assert (unit[dropped] @ unit[kept].T).max(axis=1).min() > 0.8 - 1e-6


def test_borders():
    x = np.random.default_rng(2).standard_normal(7)
    rows = np.stack([x, 3 * x, -x])
    assert diversity_filter([3.0, 2.0, 1.0], rows, threshold=1.0).tolist() == [0, 1, 2]
    assert diversity_filter([3.0, 2.0, 1.0], rows, threshold=0.999).tolist() == [0, 2]
    assert diversity_filter([3.0, 2.0, 1.0], rows, threshold=-1.0).tolist() == [0, 2]
    assert diversity_filter([3.0], rows[:1], threshold=-1.0).tolist() == [0]
    assert diversity_filter([np.nan, 2.0, 1.0], rows, threshold=0.9).tolist() == [1, 2]
    assert diversity_filter([np.nan], rows[:1]).tolist() == []


def test_groups_also_drop_what_is_like_a_dropped_one():
    angles = np.deg2rad([0, 180, 20, 40])
    rows = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    scores, threshold = [4.0, 3.0, 2.0, 1.0], np.cos(np.deg2rad(25))
    assert diversity_filter(scores, rows, threshold=threshold).tolist() == [0, 1, 3]
    assert diversity_filter(scores, rows, threshold=threshold, batch_size=3).tolist() == [0, 1]


def test_groups_of_the_published_code_compare_zeros_too():
    rows = [[1.0, 0.0], [-1.0, 0.0], [0.0, -1.0], [-0.6, -0.8]]
    scores = [4.0, 3.0, 2.0, 1.0]
    assert diversity_filter(scores, rows, threshold=-0.5).tolist() == [0, 1]
    assert diversity_filter(scores, rows, threshold=-0.5, batch_size=1).tolist() == [0]
    assert diversity_filter(scores, rows, threshold=0.0, batch_size=1).tolist() == [0, 1, 2]
    assert diversity_filter(scores, rows, threshold=0.0, batch_size=2).tolist() == [0, 1, 2]


def test_zero_vector_is_kept_with_a_warning():
    with pytest.warns(UserWarning, match=r"ids \[1\]"):
        assert diversity_filter([2.0, 1.0], [[1.0, 0.0], [0.0, 0.0]]).tolist() == [0, 1]


def test_errors_name_the_value():
    with pytest.raises(ValueError, match="conversation 1 differs"):
        conversation_scores([[1.0], [1.0]], [[1.0], [1.0, 2.0]])
    with pytest.raises(ValueError, match="at least one"):
        conversation_scores()
    with pytest.raises(ValueError, match=r"2 scores for embeddings of shape \(1, 2\)"):
        diversity_filter([1.0, 2.0], [[1.0, 2.0]])
    with pytest.raises(ValueError, match="size=-3"):
        diversity_filter([1.0], [[1.0]], size=-3)
    with pytest.raises(ValueError, match=r"ids \[1\]"):
        diversity_filter([2.0, 1.0], [[1.0], [np.inf]])
