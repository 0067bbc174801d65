import math

import pytest
import torch

from dsel_trl.functional.preference.wpo import aligned_logps, log_sum_squared_probs, token_logps, wpo_pair_weight


def test_token_logps_shift_by_one_and_skip_the_prompt():
    logits = torch.log(torch.tensor([[[0.5, 0.5], [0.25, 0.75], [0.9, 0.1]]]))
    logps, mask = token_logps(logits, torch.tensor([[-100, -100, 1]]))
    torch.testing.assert_close(logps, torch.tensor([[0.0, math.log(0.75)]]))
    assert mask.tolist() == [[False, True]]


def test_expected_log_probability():
    logits = torch.log(torch.tensor([0.5, 0.3, 0.2]))
    assert log_sum_squared_probs(logits).item() == pytest.approx(math.log(0.38))
    assert log_sum_squared_probs(torch.zeros(8)).item() == pytest.approx(-math.log(8))


def test_expected_log_probability_of_large_logits():
    logits = torch.tensor([1000.0, 999.0, 998.0])
    assert log_sum_squared_probs(logits).item() == pytest.approx(log_sum_squared_probs(logits - 1000).item(), abs=1e-6)


def test_a_uniform_policy_is_perfectly_aligned():
    logits = torch.zeros(2, 4, 8)
    logps, mask = token_logps(logits, torch.tensor([[-100, 1, 2, 3], [-100, 4, -100, -100]]))
    aligned = aligned_logps(logps, log_sum_squared_probs(logits[:, :-1]), mask)
    torch.testing.assert_close(aligned, torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(wpo_pair_weight(aligned[:1], aligned[1:]), torch.ones(1))


def test_alignment_is_a_mean_over_tokens_and_empty_is_zero():
    logps = torch.tensor([[-1.0, -3.0, -9.0], [-1.0, -1.0, -1.0]])
    mask = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    assert aligned_logps(logps, torch.full((2, 3), -1.5), mask).tolist() == [-0.5, 0.0]


def test_the_cap_acts_on_the_product():
    chosen, rejected = torch.tensor([1.0, 1.0]), torch.tensor([-3.0, 0.5])
    torch.testing.assert_close(wpo_pair_weight(chosen, rejected), torch.tensor([math.exp(-2.0), 1.0]))
    torch.testing.assert_close(wpo_pair_weight(chosen, rejected, cap=None), torch.exp(torch.tensor([-2.0, 1.5])))
    assert not wpo_pair_weight(chosen.requires_grad_(), rejected).requires_grad
