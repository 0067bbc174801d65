import numpy as np
import pytest
import torch
from scipy.optimize import linprog

from dsel_trl.functional import sinkhorn as module
from dsel_trl.functional.sinkhorn import cost_matrix, exact_transport, potentials, sinkhorn


def sets(n=23, m=7, d=4, seed=0):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.standard_normal((n, d))), torch.from_numpy(rng.standard_normal((m, d)) + 0.5)


def plan_of(found, costs, eps):
    f, g = torch.from_numpy(found.f)[:, None], torch.from_numpy(found.g)
    return torch.exp((f + g - costs) / eps) / costs.numel()


@pytest.mark.parametrize("metric", module.METRICS)
def test_costs(metric):
    x, y = sets()
    if metric == "cosine":
        expected = 2 - 2 * torch.nn.functional.cosine_similarity(x[:, None], y[None], dim=2)
    else:
        expected = torch.cdist(x, y) ** (2 if metric == "sqeuclidean" else 1)
    torch.testing.assert_close(cost_matrix(x, y, metric), expected)


@pytest.mark.parametrize("metric", module.METRICS)
def test_the_plan_has_its_masses_and_its_cost(metric):
    x, y = sets()
    found = sinkhorn(x, y, metric=metric, eps=0.1, tolerance=1e-9)
    plan = plan_of(found, cost_matrix(x, y, metric), 0.1)
    torch.testing.assert_close(plan.sum(dim=1), torch.full((23,), 1 / 23, dtype=torch.float64))
    torch.testing.assert_close(plan.sum(dim=0), torch.full((7,), 1 / 7, dtype=torch.float64))
    assert found.cost == pytest.approx(float((plan * cost_matrix(x, y, metric)).sum()))
    assert found.error <= 1e-9
    assert abs(found.f.mean()) < 1e-12


def test_blocks_and_types_do_not_matter(monkeypatch):
    x, y = sets(n=50)
    whole = sinkhorn(x, y, tolerance=1e-8)
    monkeypatch.setattr(module, "BLOCK", 30)
    blocks = sinkhorn(x, y, tolerance=1e-8)
    np.testing.assert_allclose(blocks.f, whole.f, atol=1e-10)
    half = sinkhorn(x.float(), y.float(), tolerance=1e-5)
    np.testing.assert_allclose(half.f, whole.f, atol=1e-4)


def test_less_smoothing_comes_to_the_optimum():
    x, y = sets(n=11, m=5)
    costs = cost_matrix(x, y).numpy()
    rows, columns = np.kron(np.eye(11), np.ones(5)), np.kron(np.ones(11), np.eye(5))
    best = linprog(costs.ravel(), A_eq=np.vstack([rows, columns]), b_eq=[1 / 11] * 11 + [1 / 5] * 5).fun
    paid = [sinkhorn(x, y, smooth=smooth, tolerance=1e-6).cost for smooth in (0.2, 0.05, 0.005)]
    assert paid[0] > paid[1] > paid[2] > best
    assert paid[2] == pytest.approx(best, rel=0.02)


def test_annealing_saves_iterations():
    x, y = sets(n=60, m=20)
    how = {"smooth": 0.01, "tolerance": 1e-4, "max_iterations": 100_000}
    assert sinkhorn(x, y, **how).iterations < sinkhorn(x, y, anneal=False, **how).iterations


def test_a_far_target_is_reached():
    x, _ = sets()
    far = torch.tensor([[0.0] * 4, [30.0] * 4]).double()
    found = sinkhorn(x, far, metric="sqeuclidean", eps=1.0, tolerance=1e-6, anneal=False)
    assert found.error <= 1e-6
    assert np.isfinite(found.f).all()


def test_equal_sources_have_equal_potentials_and_later_ones_too():
    x, y = sets()
    x[5] = x[2]
    found = sinkhorn(x, y, eps=0.05)
    assert found.f[5] == pytest.approx(found.f[2], abs=1e-12)
    later, _ = potentials(x[2:3], y, torch.from_numpy(found.g), eps=0.05)
    assert float(later[0]) == pytest.approx(found.f[2], abs=1e-12)


def test_vectors_that_are_the_same_have_nothing_to_say():
    same = sinkhorn(torch.ones(4, 3), torch.ones(2, 3))
    np.testing.assert_allclose(same.f, np.zeros(4), atol=1e-6)
    assert same.cost == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"metric": "l2"}, "metric='l2'"),
        ({"eps": 0.0}, "eps=0.0"),
        ({"max_iterations": 0}, "max_iterations=0"),
        ({"targets": torch.zeros(3, 5).double()}, "4 numbers each, targets 5"),
        ({"targets": torch.zeros(0, 4).double()}, "`targets` has shape"),
    ],
)
def test_wrong_inputs(given, message):
    x, y = sets()
    with pytest.raises(ValueError, match=message):
        sinkhorn(x, given.pop("targets", y), **given)


def test_the_exact_answer():
    pytest.importorskip("ot", reason="needs the extra `ot`")
    x, y = sets(n=11, m=5)
    exact = exact_transport(x, y)
    assert exact.cost == pytest.approx(sinkhorn(x, y, smooth=0.002, tolerance=1e-6).cost, rel=0.01)
    assert (exact.f[:, None] + exact.g <= cost_matrix(x, y).numpy() + 1e-9).all()
    assert exact.f.mean() + exact.g.mean() == pytest.approx(exact.cost)
