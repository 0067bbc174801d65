"""K-FAC: what the oracle does not say."""

import pytest
import torch

from dsel_trl.functional.influence.quad import balance, damping, factored_ihvp, ihvp, kfac_sums

torch.manual_seed(0)
X, DELTA = torch.randn(4, 5, 3, dtype=torch.float64), torch.randn(4, 5, 2, dtype=torch.float64)
GRADIENT = torch.randn(2, 3, dtype=torch.float64)


def factors():
    first, second, count = kfac_sums(X, DELTA)
    return first / count, second / count


def test_positions_without_gradient_do_not_count():
    padded = torch.cat([X, torch.ones(4, 3, 3, dtype=torch.float64)], 1), torch.cat([DELTA, torch.zeros(4, 3, 2)], 1)
    for found, expected in zip(kfac_sums(*padded), kfac_sums(X, DELTA), strict=True):
        torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(expected))


def test_both_solve_the_equation_that_they_stand_for():
    s_x, s_delta = factors()
    lam = 0.3
    hessian = torch.kron(s_delta, s_x) + lam * torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(hessian @ ihvp(GRADIENT, s_x, s_delta, lam).flatten(), GRADIENT.flatten())
    pi = balance(s_x, s_delta)
    first = s_delta + lam**0.5 / pi * torch.eye(2, dtype=torch.float64)
    second = s_x + lam**0.5 * pi * torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(first @ factored_ihvp(GRADIENT, s_x, s_delta, lam, pi) @ second, GRADIENT)
    # Equal shares of both means.
    assert lam**0.5 * pi / s_x.trace() * 3 == pytest.approx(float(lam**0.5 / pi / s_delta.trace() * 2))


def test_the_damping_is_a_share_of_the_mean_eigenvalue_and_always_positive():
    s_x, s_delta = factors()
    mean = torch.linalg.eigvalsh(torch.kron(s_delta, s_x)).mean()
    assert damping(s_x, s_delta, 0.1) == pytest.approx(0.1 * float(mean))
    nothing = torch.zeros(2, 2)
    assert damping(s_x.float(), nothing) > 0
    assert balance(s_x, nothing) == 1.0
    # As of LoRA's first matrix while the second one is 0: neither it nor the target has any gradient.
    assert ihvp(torch.zeros(2, 3), s_x.float(), nothing, damping(s_x.float(), nothing)).abs().max() == 0


@pytest.mark.parametrize("solve", [ihvp, factored_ihvp])
@pytest.mark.parametrize("lam", [0.0, -1.0, float("nan")])
def test_a_damping_that_is_not_positive_is_an_error(solve, lam):
    with pytest.raises(ValueError, match="damping must be positive"):
        solve(GRADIENT, *factors(), lam)
