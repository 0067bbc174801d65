"""GREATS: the greedy choice against all subsets, and what cannot be measured."""

import itertools

import pytest
import torch

from dsel_trl.functional.influence.greats import direction_terms, greedy_selection, step_terms


def test_without_overlap_the_best_are_chosen_in_order_and_equals_by_position():
    scores = torch.tensor([0.1, 3.0, -1.0, 3.0, 2.0])
    assert greedy_selection(scores, torch.zeros(5, 5), 4).tolist() == [1, 3, 4, 0]
    assert greedy_selection(scores, torch.zeros(5, 5), 9).tolist() == [1, 3, 4, 0, 2]
    assert greedy_selection(scores, torch.zeros(5, 5), 0).tolist() == [1]


def test_of_two_that_say_the_same_one_is_chosen():
    gradients = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.9]])
    target = torch.tensor([1.0, 1.0])
    terms = step_terms(gradients @ target, gradients @ gradients.T, 1.0)
    assert greedy_selection(*terms, 2).tolist() == [0, 2]
    # With a small learning rate the overlap is lost beside the alignment.
    terms = step_terms(gradients @ target, gradients @ gradients.T, 1e-3)
    assert greedy_selection(*terms, 2).tolist() == [0, 1]
    # Of gradients of length 1 it is not.
    terms = direction_terms(gradients @ target, gradients @ gradients.T, float(target.norm()), 2)
    assert greedy_selection(*terms, 2).tolist() == [0, 2]


@pytest.mark.parametrize("seed", range(5))
def test_two_of_orthogonal_groups_are_the_best_pair_of_all(seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(6, generator=generator)
    shared = torch.block_diag(*[torch.full((2, 2), 2.0)] * 3)
    best = max(itertools.combinations(range(6), 2), key=lambda s: float(scores[list(s)].sum() - shared[s[0], s[1]]))
    assert set(greedy_selection(scores, shared, 2).tolist()) == set(best)


def test_what_is_not_known_is_chosen_last_and_takes_nothing_from_others():
    scores = torch.tensor([torch.nan, 1.0, 2.0, torch.inf])
    shared = torch.zeros(4, 4)
    shared[0] = shared[:, 0] = torch.nan
    assert greedy_selection(scores, shared, 4).tolist() == [2, 1, 0, 3]


def test_a_zero_gradient_has_no_direction():
    gradients = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    scores, shared = direction_terms(gradients @ torch.tensor([1.0, 0.0]), gradients @ gradients.T, 1.0, 1)
    torch.testing.assert_close(scores, torch.tensor([0.0, 0.6]))
    torch.testing.assert_close(shared, torch.tensor([[0.0, 0.0], [0.0, 1.0]]))
