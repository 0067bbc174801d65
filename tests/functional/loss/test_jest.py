import numpy as np
import pytest

from dsel_trl.functional.loss.jest import (
    chunk_size,
    conditional_logits,
    jest_select,
    learnability,
    separable_select,
    similarity_penalty_matrix,
)

MATRIX = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])


def test_learnability():
    assert learnability([3.0, 1.0], [1.0, 4.0]).tolist() == [2.0, -3.0]


def test_conditional_logits_by_hand():
    assert conditional_logits(MATRIX, []).tolist() == [1, 5, 9]
    assert conditional_logits(MATRIX, [0]).tolist() == [1 + 1 + 1 - 1e8, 5 + 2 + 4, 9 + 3 + 7]


def test_chunks():
    assert chunk_size(204.8, cover=False) == 12
    assert chunk_size(204.8) == 13
    assert (chunk_size(1, 16), chunk_size(1, 16, cover=False)) == (1, 0)
    assert chunk_size(32, 16) == chunk_size(32, 16, cover=False) == 2


def test_selection_has_no_repeats_and_may_exhaust_the_batch():
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((20, 20))
    ids = jest_select(matrix, 4, 3, np.random.default_rng(1))
    assert len(ids) == len(set(ids.tolist())) == 12
    assert ids.tolist() == jest_select(matrix, 4, 3, np.random.default_rng(1)).tolist()
    assert sorted(jest_select(matrix, 9, 3, np.random.default_rng(1)).tolist()) == list(range(20))


def test_separable_case_is_monotone_in_learnability():
    scores = np.array([-2.0, 0.0, 1.0, 3.0])
    diagonal = np.diag(scores)
    joint, single = np.zeros(4), np.zeros(4)
    for seed in range(600):
        joint[jest_select(diagonal, 2, 1, np.random.default_rng(seed))] += 1
        single[separable_select(scores, 2, np.random.default_rng(seed + 1000))] += 1
    assert (np.diff(joint) > 0).all()
    np.testing.assert_allclose(joint / 600, single / 600, atol=0.08)
    assert separable_select(scores, 2, temperature=0).tolist() == [3, 2]


def test_similarity_penalty_spreads_the_batch():
    embeddings = [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]
    matrix = similarity_penalty_matrix([5.0, 4.0, 3.0], embeddings, penalty=10.0)
    assert matrix.diagonal().tolist() == [5, 4, 3]
    assert conditional_logits(matrix, [0])[1:].tolist() == [4 - 20, 3]


def test_errors_name_the_value():
    with pytest.raises(ValueError, match=r"\(2,\) and \(1,\)"):
        learnability([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match=r"1\.0"):
        chunk_size(-1.0)
    with pytest.raises(ValueError, match="num_chunks"):
        chunk_size(10, 0)
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        conditional_logits(np.zeros((2, 3)), [])
    with pytest.raises(ValueError, match="0 and 3"):
        jest_select(MATRIX, 0, 3, np.random.default_rng(0))
