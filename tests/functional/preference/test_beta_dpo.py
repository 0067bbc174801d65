import math

import pytest
import torch

from dsel_trl.functional.preference.beta_dpo import (
    batch_beta,
    draw_mask,
    kept_mean_weights,
    kept_pairs,
    log_keep_weights,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_keep_weights_by_hand():
    weights = log_keep_weights(torch.tensor([1.0, 3.0, -1.0, math.nan]), mean=1.0, std=2.0).exp()
    torch.testing.assert_close(weights, torch.tensor([1.0, math.exp(-0.5), math.exp(-0.5), 0.0]))


def test_no_deviation_weighs_all_alike():
    assert log_keep_weights(torch.tensor([1.0, 9.0]), mean=0.0, std=0.0).tolist() == [0.0, 0.0]
    assert log_keep_weights(torch.tensor([1.0]), mean=0.0, std=math.nan).tolist() == [0.0]


@pytest.mark.parametrize(
    ("batch", "ratio", "expected"), [(8, 0.2, 6), (10, 0.3, 7), (1, 0.2, 1), (5, 0.0, 5), (2, 0.9, 1)]
)
def test_number_of_kept_pairs(batch, ratio, expected):
    assert kept_pairs(batch, ratio) == expected


def test_filter_ratio_is_checked():
    with pytest.raises(ValueError, match=r"1\.0"):
        kept_pairs(8, 1.0)


def test_draw_keeps_exactly_k_and_follows_the_weights():
    log_weights = torch.log(torch.tensor([0.6, 0.3, 0.1]))
    source = generator()
    masks = torch.stack([draw_mask(log_weights, 1, source) for _ in range(3000)])
    assert (masks.sum(1) == 1).all()
    torch.testing.assert_close(masks.mean(0), torch.tensor([0.6, 0.3, 0.1]), atol=0.03, rtol=0)
    assert draw_mask(log_weights, 2, generator(1)).sum() == 2


def test_outliers_lose_even_where_their_weights_underflow():
    margin = torch.tensor([100.0, 0.0, 500.0, 90.0, math.nan])
    log_weights = log_keep_weights(margin, mean=0.0, std=1.0)
    assert (log_weights.exp() > 0).sum() == 1
    assert draw_mask(log_weights, 3, generator()).tolist() == [1.0, 1.0, 0.0, 1.0, 0.0]
    assert draw_mask(log_weights, 5, generator()).tolist() == [1.0, 1.0, 1.0, 1.0, 0.0]


def test_the_same_seed_draws_the_same_mask():
    log_weights = torch.zeros(20)
    assert torch.equal(draw_mask(log_weights, 5, generator(3)), draw_mask(log_weights, 5, generator(3)))
    assert not torch.equal(draw_mask(log_weights, 5, generator(3)), draw_mask(log_weights, 5, generator(4)))


def test_batch_beta_by_hand():
    margin, mask = torch.tensor([2.0, 4.0, 100.0]), torch.tensor([1.0, 1.0, 0.0])
    assert batch_beta(margin, mask, mean=1.0, std=1.0, beta=0.1, a=0.6) == pytest.approx(0.1 * (1 + 0.6 * 2.0))
    assert batch_beta(-margin, mask, mean=1.0, std=1.0) == 1e-3
    assert batch_beta(margin, torch.zeros(3), mean=1.0, std=1.0, beta=0.1) == 0.1


@pytest.mark.parametrize(("margin", "std"), [([4.0], 1.0), ([4.0, math.nan], 1.0), ([4.0, 4.0], 0.0)])
def test_without_company_or_deviation_the_beta_is_the_base_beta(margin, std):
    margin = torch.tensor(margin)
    assert batch_beta(margin, torch.isfinite(margin).float(), mean=1.0, std=std, beta=0.1) == 0.1


def test_the_weighted_mean_is_that_of_the_kept_pairs():
    losses, mask = torch.tensor([0.3, 5.0, 0.9, 7.0]), torch.tensor([1.0, 0.0, 1.0, 0.0])
    assert (kept_mean_weights(mask) * losses).mean().item() == pytest.approx(0.6)
    assert kept_mean_weights(torch.ones(7)).tolist() == [1.0] * 7
    assert kept_mean_weights(torch.zeros(3)).tolist() == [0.0] * 3
