import numpy as np
import pytest
import torch

from dsel_trl.functional.target import seal

IDS, LOSSES = np.array([1, 4, 1]), np.array([0.5, 2.0, 1.0])


@pytest.mark.parametrize("activation", seal.ACTIVATIONS)
def test_the_gradient_is_that_of_the_weighted_mean(activation):
    logits = torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    weights = 7 * logits.softmax(0) if activation == "softmax" else 2 * logits.sigmoid()
    np.testing.assert_allclose(seal.selector_weights(logits.detach(), activation), weights.detach())
    (weights[IDS] * torch.from_numpy(LOSSES)).mean().backward()
    np.testing.assert_allclose(seal.selector_gradient(logits.detach(), IDS, LOSSES, activation), logits.grad)


def test_weights_are_safe_at_the_ends():
    assert seal.selector_weights([1000.0, 0.0]).tolist() == [2.0, 0.0]
    assert seal.selector_weights(np.zeros(11)).tolist() == [1.0] * 11
    with pytest.raises(ValueError, match="activation='relu'"):
        seal.selector_weights([0.0], "relu")


def test_a_loss_that_is_not_known_moves_nothing():
    logits, ids = np.zeros(4), np.array([0, 1, 2])
    losses = np.array([1.0, np.nan, 3.0])
    assert seal.sparse_update(logits, ids, losses, 0.1)[1] == 0
    gradient = seal.selector_gradient(logits, ids, losses)
    np.testing.assert_allclose(gradient, seal.selector_gradient(logits, ids[[0, 2]], losses[[0, 2]]))
    assert not seal.selector_gradient(logits, ids[1:2], losses[1:2]).any()


def test_a_sparse_step_moves_its_own_by_what_is_not_common():
    moved = seal.sparse_update(np.zeros(6), IDS, LOSSES, 0.3)
    assert set(np.flatnonzero(moved)) == {1, 4}
    assert moved[1] > 0 > moved[4]
    assert moved.sum() == pytest.approx(0)
    np.testing.assert_allclose(seal.sparse_update(np.zeros(6), IDS, LOSSES + 5, 0.3), moved)
    assert seal.sparse_update(np.zeros(6), IDS, LOSSES, 1e6)[4] == -seal.LIMIT


def test_adam_is_torchs():
    rng = np.random.default_rng(0)
    values = torch.nn.Parameter(torch.from_numpy(rng.standard_normal(5)))
    optimizer = torch.optim.Adam([values], lr=0.1, betas=(0.9, 0.95))
    own, moments = values.detach().numpy().copy(), seal.Moments(np.zeros(5), np.zeros(5), 0)
    for _ in range(4):
        gradient = rng.standard_normal(5)
        values.grad = torch.from_numpy(gradient)
        optimizer.step()
        own, moments = seal.adam_update(own, gradient, moments, 0.1)
        np.testing.assert_allclose(own, values.detach().numpy())


def test_the_upper_weight_stays_a_share():
    assert [seal.upper_weight(0.5, 0.3, passes) for passes in range(3)] == pytest.approx([0.5, 0.2, 0.0])
    assert seal.upper_weight(1.5, 0.0, 0) == 1.0
