import math

import numpy as np
import pytest
import torch

from dsel_trl.functional.running import (
    EmaMoments,
    Moments,
    batch_moments,
    ema_update,
    moments_update,
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


def test_moments_of_a_stream_are_those_of_all_its_values():
    values = np.random.default_rng(0).normal(3.0, 2.0, size=50)
    state = Moments()
    for piece in (values[:1], values[1:20], np.array([np.nan, np.inf]), values[20:]):
        state = moments_update(state, piece)
    expected = (values - values.mean()) / values.std()
    np.testing.assert_allclose(state.standardised(values), expected, rtol=1e-10)
    assert np.isnan(state.standardised(np.array([np.nan]))).all()


def test_moments_forget_what_is_older_than_their_memory():
    state = moments_update(moments_update(Moments(), np.zeros(1000)), np.array([1.0, 3.0]), memory=2)
    assert (state.count, state.mean) == (4.0, 1.0)
    assert state.squares == pytest.approx(np.square(np.array([0.0, 0.0, 1.0, 3.0]) - 1.0).sum())


def test_equal_values_are_all_the_mean():
    state = moments_update(Moments(), np.array([0.1, 0.1, 0.1]))
    assert state.standardised(np.array([0.1, 0.1])).tolist() == [0.0, 0.0]
