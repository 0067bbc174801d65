import math

import pytest
import torch

from dsel_trl.functional.margins import (
    average_logps,
    dpo_loss,
    explicit_margin,
    implicit_margin,
    log_ratio_margin,
    simpo_margin,
    valid_pairs,
)

POLICY = (torch.tensor([-10.0, -4.0]), torch.tensor([-12.0, -3.0]))
REFERENCE = (torch.tensor([-11.0, -4.0]), torch.tensor([-12.5, -5.0]))


def test_margins_by_hand():
    # (-10 + 11) - (-12 + 12.5) = 0.5; (-4 + 4) - (-3 + 5) = -2
    assert log_ratio_margin(*POLICY, *REFERENCE).tolist() == [0.5, -2.0]
    torch.testing.assert_close(implicit_margin(*POLICY, *REFERENCE, beta=0.1), torch.tensor([0.05, -0.2]))
    assert simpo_margin(*POLICY, beta=2.0).tolist() == [4.0, -2.0]
    assert explicit_margin(torch.tensor([3.0, math.nan]), torch.tensor([1.0, 1.0]))[0] == 2.0


def test_equal_policy_and_reference_have_no_margin_and_loss_log_2():
    margin = log_ratio_margin(*POLICY, *POLICY)
    assert margin.tolist() == [0.0, 0.0]
    torch.testing.assert_close(dpo_loss(margin), torch.full((2,), math.log(2.0)))


def test_empty_completion_has_average_zero_and_is_invalid():
    lengths = torch.tensor([4, 0])
    assert average_logps(torch.tensor([-8.0, 0.0]), lengths).tolist() == [-2.0, 0.0]
    assert valid_pairs(lengths, torch.tensor([1, 1])).tolist() == [True, False]
    assert valid_pairs(torch.tensor([1, 1]), lengths).tolist() == [True, False]


def test_loss_is_stable_far_out():
    assert dpo_loss(torch.tensor([-1e4, 1e4])).tolist() == [1e4, 0.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_upcast_before_the_difference(dtype):
    policy = torch.tensor([-100.0], dtype=dtype)
    other = torch.tensor([-100.5], dtype=dtype)
    margin = log_ratio_margin(policy, other, policy, policy)
    assert margin.dtype == torch.float32
    assert margin.item() == 100.5 - 100.0
