import math

import pytest
import torch

from dsel_trl.functional.running import (
    EmaMoments,
    batch_moments,
    ema_update,
)


def test_batch_moments_use_the_sample_deviation():
    assert batch_moments(torch.tensor([1.0, 3.0, math.nan])) == pytest.approx((2.0, math.sqrt(2.0)))
    mean, std = batch_moments(torch.tensor([0.1] * 5))
    assert std == 0.0
    mean, std = batch_moments(torch.tensor([4.0]))
    assert mean == 4.0
    assert math.isnan(std)
    assert all(math.isnan(value) for value in batch_moments(torch.tensor([])))


def test_ema_from_zero_and_from_the_first_batch():
    batch = torch.tensor([1.0, 3.0])
    zero = ema_update(EmaMoments(), batch, init="zero")
    assert (zero.mean, zero.std) == pytest.approx((0.2, 0.1 * math.sqrt(2.0)))
    first = ema_update(EmaMoments(), batch)
    assert (first.mean, first.std, first.updates) == pytest.approx((2.0, math.sqrt(2.0), 1))
    second = ema_update(first, torch.tensor([5.0, 5.0]))
    assert (second.mean, second.std) == pytest.approx((0.9 * 2 + 0.5, 0.9 * math.sqrt(2.0)))


def test_a_batch_without_a_deviation_leaves_it_alone():
    state = ema_update(EmaMoments(1.0, 2.0, 3), torch.tensor([5.0]))
    assert (state.mean, state.std) == pytest.approx((1.4, 2.0))
    assert ema_update(state, torch.tensor([math.nan])) == state


def test_the_first_measured_deviation_starts_the_average():
    state = ema_update(EmaMoments(), torch.tensor([1.0]))
    assert ema_update(state, torch.tensor([0.0, 2.0])).std == pytest.approx(math.sqrt(2.0))


def test_ema_refuses_wrong_options():
    with pytest.raises(ValueError, match=r"1\.0"):
        ema_update(EmaMoments(), torch.ones(2), decay=1.0)
    with pytest.raises(ValueError, match="'ones'"):
        ema_update(EmaMoments(), torch.ones(2), init="ones")
