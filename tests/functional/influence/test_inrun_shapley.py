"""In-run data Shapley on numbers."""

import itertools
import math

import numpy as np
import torch

from dsel_trl.functional.influence.inrun_shapley import inrun_shapley


def test_the_sum_over_a_batch_is_the_change_of_the_model():
    """Efficiency: the values of a step add up to the Taylor model of its whole change."""
    rng = np.random.default_rng(0)
    each, gradient, half = (torch.from_numpy(rng.normal(size=shape)) for shape in ((5, 3), (3,), (3, 3)))
    hessian, eta = half + half.T, 0.1
    step = -eta * each.sum(0)
    values = inrun_shapley(each @ gradient, eta, each @ hessian @ each.sum(0) * eta)
    torch.testing.assert_close(values.sum(), step @ gradient + 0.5 * step @ hessian @ step)


def test_it_is_the_shapley_value_of_the_model():
    """By its definition: the mean over all orders of what an example adds to those before it."""
    rng = np.random.default_rng(1)
    each, gradient, half = (torch.from_numpy(rng.normal(size=shape)) for shape in ((4, 3), (3,), (3, 3)))
    hessian = half + half.T
    rates = torch.tensor([0.1, 0.2, 0.05, 0.3], dtype=torch.float64)

    def utility(members):
        step = -(rates[members, None] * each[members]).sum(0)
        return step @ gradient + 0.5 * step @ hessian @ step

    expected = torch.zeros(4, dtype=torch.float64)
    for order in itertools.permutations(range(4)):
        for place, example in enumerate(order):
            before = list(order[:place])
            expected[example] += (utility([*before, example]) - utility(before)) / math.factorial(4)
    bent = hessian @ (rates[:, None] * each).sum(0)
    torch.testing.assert_close(inrun_shapley(each @ gradient, rates, each @ bent), expected)
