"""Extra passes: batches by token budget, sharded over the ranks, results in the order that was asked for."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dsel_trl import SelectionCallback
from dsel_trl.core.data_passes import Passes, cut_by_tokens
from tests import tiny

LENGTHS = np.random.default_rng(0).integers(1, 30, size=53).astype(np.int32)


@pytest.mark.parametrize("tokens", [1, 17, 64, 10_000])
def test_batches_hold_every_example_once_within_the_budget(tokens):
    batches = cut_by_tokens(LENGTHS, tokens)
    assert sorted(np.concatenate(batches).tolist()) == list(range(53))
    for batch in batches:
        assert len(batch) == 1 or LENGTHS[batch].max() * len(batch) <= tokens
    longest = [LENGTHS[batch].max() for batch in batches]
    assert longest == sorted(longest, reverse=True)


def test_batches_are_as_large_as_the_budget_allows():
    batches = cut_by_tokens(np.full(10, 5), 20)
    assert [len(batch) for batch in batches] == [4, 4, 2]


def test_empty_and_zero_lengths():
    assert cut_by_tokens(np.empty(0, dtype=int), 8) == []
    assert [len(batch) for batch in cut_by_tokens(np.zeros(5, dtype=int), 4)] == [4, 1]


def passes_of(rank=0, world=1, total=lambda values: values, seen=None):
    """Passes whose batch is the tensor of its ids."""

    def forward(inputs, ids):
        if seen is not None:
            seen.append(ids.tolist())
        return inputs

    rows = SimpleNamespace(pass_lengths=LENGTHS, collate=lambda ids: torch.from_numpy(ids.copy()))
    return Passes(lambda: rows, forward, rank, world, total)


def squares(batch):
    return batch.double() ** 2


def test_results_follow_the_ids_asked_for():
    ids = np.array([40, 2, 17, 2, 0])
    assert passes_of().measure(squares, ids, tokens=40).tolist() == [1600, 4, 289, 4, 0]
    assert passes_of().measure(squares).tolist() == (np.arange(53) ** 2).tolist()


def test_several_values_per_example():
    values = passes_of().measure(lambda ids: torch.stack([ids, -ids], dim=1), np.array([3, 1]), tokens=10)
    assert values.tolist() == [[3, -3], [1, -1]]
    assert values.dtype == np.float32


def test_no_examples_no_values():
    assert passes_of().measure(squares, np.empty(0, dtype=int)).shape == (0,)


def test_another_forward():
    assert passes_of().measure(squares, np.array([2]), forward=lambda inputs, ids: inputs + 1).tolist() == [9]


@pytest.mark.parametrize("world", [2, 3, 5])
@pytest.mark.parametrize("tokens", [30, 200, 5000])
def test_ranks_share_the_batches_and_run_equally_many(world, tokens):
    parts, forwards = [], []
    for rank in range(world):
        seen, kept = [], []
        passes = passes_of(rank, world, total=lambda values, kept=kept: kept.append(values) or values, seen=seen)
        passes.measure(squares, tokens=tokens)
        parts.append(kept[0])
        forwards.append(seen)
    assert len({len(seen) for seen in forwards}) == 1
    assert torch.stack(parts).sum(dim=0).tolist() == (np.arange(53) ** 2).tolist()
    batches = cut_by_tokens(LENGTHS, tokens)
    assert len(forwards[0]) == -(-len(batches) // world)


def test_a_pass_does_not_depend_on_its_batches(make_trainer):
    trainer = make_trainer("dpo")
    tiny.stir(trainer)
    callback = SelectionCallback(trainer, "uniform")
    passes = callback.run.passes
    large = passes.measure(lambda batch: batch.implicit_margin, tokens=4096)
    small = passes.measure(lambda batch: batch.implicit_margin, tokens=60)
    np.testing.assert_allclose(large, small, rtol=1e-4, atol=1e-5)
    assert len(np.unique(large)) == 40
    alone = passes.measure(lambda batch: batch.implicit_margin, np.array([11]))
    np.testing.assert_allclose(alone, large[[11]], rtol=1e-4, atol=1e-5)
