"""Bootstrap intervals of paired differences, and counted operations."""

import numpy as np
import pytest

from dsel_trl.functional.compute import selection_flops, training_flops
from dsel_trl.functional.resampling import bootstrap_interval


def test_an_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(200):
        low, high = bootstrap_interval(rng.normal(1.0, 2.0, 40), rng, level=0.9, resamples=500)
        inside += low <= 1.0 <= high
    assert 0.83 <= inside / 200 <= 0.95


def test_the_same_draws_give_the_same_interval_and_few_values_give_none():
    values = [0.1, 0.4, -0.2]
    first, again = (bootstrap_interval(values, np.random.default_rng(3)) for _ in range(2))
    assert first == again
    assert -0.2 - 1e-12 <= first[0] < np.mean(values) < first[1] <= 0.4 + 1e-12
    assert np.isnan(bootstrap_interval([1.0], np.random.default_rng(0))).all()
    with pytest.raises(ValueError, match="must be finite"):
        bootstrap_interval([1.0, float("nan")], np.random.default_rng(0))
    with pytest.raises(ValueError, match="level=1"):
        bootstrap_interval([1.0, 2.0], np.random.default_rng(0), level=1)


def test_operations():
    assert training_flops(10, 3) == 180
    assert training_flops(10, 3, adapter=True, reference=True) == 180
    assert selection_flops(10, 3, 2) == 60 + 80
