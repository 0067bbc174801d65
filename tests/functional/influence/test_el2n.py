"""EL2N out of two numbers per token, against the whole distribution."""

import math

import numpy as np
import torch

from dsel_trl.functional.influence.el2n import pair_el2n, token_el2n, token_mean
from dsel_trl.functional.preference.wpo import log_sum_squared_probs, target_logps
from dsel_trl.functional.running import add_to_means


def test_tokens_are_as_far_as_the_whole_distribution_says():
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(3, 5, 11, generator=generator, dtype=torch.float64)
    labels = torch.randint(11, (3, 5), generator=generator)
    onehot = torch.nn.functional.one_hot(labels, 11)
    expected = (logits.softmax(-1) - onehot).norm(dim=-1)
    got = token_el2n(target_logps(logits, labels), log_sum_squared_probs(logits))
    torch.testing.assert_close(got, expected)


def test_a_certain_label_is_at_no_distance_and_a_certain_mistake_at_the_greatest():
    logits = torch.tensor([[100.0, 0.0, 0.0], [100.0, 0.0, 0.0]])
    labels = torch.tensor([0, 1])
    got = token_el2n(target_logps(logits, labels), log_sum_squared_probs(logits))
    torch.testing.assert_close(got, torch.tensor([0.0, math.sqrt(2)]))


def test_only_label_tokens_count_and_without_one_nothing_is_known():
    tokens = torch.tensor([[1.0, 0.5, torch.nan], [torch.nan, torch.nan, torch.nan]])
    mask = torch.tensor([[True, True, False], [False, False, False]])
    torch.testing.assert_close(token_mean(tokens, mask), torch.tensor([0.75, torch.nan]), equal_nan=True)


def test_a_pair_is_a_choice_between_two():
    margin = torch.tensor([-3.0, 0.0, 2.0])
    p = torch.sigmoid(margin)
    expected = (torch.stack([p, 1 - p], 1) - torch.tensor([1.0, 0.0])).norm(dim=1)
    torch.testing.assert_close(pair_el2n(margin), expected)


def test_means_take_repeated_ids_and_leave_out_what_is_not_known():
    means, counts = np.array([np.nan, 2.0, 5.0]), np.array([0.0, 3.0, 1.0])
    got = add_to_means(means, counts, np.array([0, 1, 0, 2, 1]), np.array([1.0, 6.0, 2.0, np.nan, np.inf]))
    np.testing.assert_allclose(got, [1.5, 3.0, 5.0])
    assert counts.tolist() == [2.0, 4.0, 1.0]
    got = add_to_means(np.array([np.nan]), np.zeros(1), np.array([0]), np.array([np.nan]))
    assert np.isnan(got).all()
