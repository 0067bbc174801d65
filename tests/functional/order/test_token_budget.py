import numpy as np
import pytest

from dsel_trl.functional.order.token_budget import padded_tokens, sorted_windows, token_budget_batches

LENGTHS = np.random.default_rng(0).integers(0, 500, size=1234)


def test_windows_by_hand():
    assert sorted_windows([1, 5, 3, 4, 9], [0, 1, 2, 3, 4], 2).tolist() == [1, 0, 3, 2, 4]
    assert sorted_windows([2, 2, 2], [2, 0, 1], 3).tolist() == [2, 0, 1]


@pytest.mark.parametrize("window", [1, 7, 64, 5000])
@pytest.mark.parametrize("rows", [1, 2])
def test_every_id_once_within_the_budget(window, rows):
    batches = token_budget_batches(LENGTHS, 2048, np.random.default_rng(1), window=window, rows_per_example=rows)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(LENGTHS)))
    assert padded_tokens(batches, LENGTHS, rows_per_example=rows).max() <= 2048
    assert all((np.diff(LENGTHS[batch]) <= 0).all() for batch in batches)


def test_batches_are_as_large_as_the_budget_allows():
    batches = token_budget_batches(np.full(100, 10), 65, np.random.default_rng(0), window=50)
    assert sorted(map(len, batches)) == [2] * 2 + [6] * 16
    capped = token_budget_batches(np.full(100, 10), 65, np.random.default_rng(0), window=50, max_examples=5)
    assert {len(batch) for batch in capped} == {5}


def test_an_example_above_the_budget_is_alone():
    batches = token_budget_batches([100, 5, 5], 10, np.random.default_rng(0))
    assert sorted(batch.tolist() for batch in batches if 0 in batch) == [[0]]
    assert padded_tokens(batches, [100, 5, 5]).tolist().count(10) == 1


def test_larger_windows_pad_less():
    def padding(window):
        return padded_tokens(
            token_budget_batches(LENGTHS, 4096, np.random.default_rng(0), window=window), LENGTHS
        ).sum()

    assert LENGTHS.sum() < padding(1000) < padding(100) < padding(32)


def test_reproducible_and_shuffled():
    first, second, other = (token_budget_batches(LENGTHS, 2048, np.random.default_rng(s)) for s in (3, 3, 4))
    assert all((a == b).all() for a, b in zip(first, second, strict=True))
    assert any(a.tolist() != b.tolist() for a, b in zip(first, other, strict=False))
    heads = [LENGTHS[batch[0]] for batch in first]
    assert heads != sorted(heads, reverse=True)


def test_no_examples():
    assert token_budget_batches([], 10, np.random.default_rng(0)) == []
    assert padded_tokens([], []).tolist() == []


def test_errors_name_the_value():
    with pytest.raises(ValueError, match="budget=0"):
        token_budget_batches([1], 0, np.random.default_rng(0))
    with pytest.raises(ValueError, match="max_examples"):
        token_budget_batches([1], 1, np.random.default_rng(0), max_examples=0)
    with pytest.raises(ValueError, match="non-negative"):
        token_budget_batches([-1], 1, np.random.default_rng(0))
