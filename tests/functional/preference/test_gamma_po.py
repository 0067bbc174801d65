import math

import numpy as np
import pytest
import torch

from dsel_trl.functional.preference.gamma_po import GapQueue, gamma_po_loss, queue_draw, queue_push, target_margins

GAPS = torch.tensor([-2.0, 0.5, 3.0, 8.0])


def test_margins_keep_their_mean_and_grow_with_the_gap():
    margins = target_margins(GAPS, gamma0=4.0, tau=3.0)
    assert margins.mean().item() == pytest.approx(4.0, abs=1e-5)
    assert (margins.diff() > 0).all()
    assert (margins > 0).all()


def test_equal_gaps_and_high_temperature_give_the_common_margin():
    torch.testing.assert_close(target_margins(torch.full((5,), 1.3), 4.0), torch.full((5,), 4.0))
    torch.testing.assert_close(target_margins(GAPS, 4.0, tau=1e6), torch.full((4,), 4.0), atol=1e-3, rtol=0)
    torch.testing.assert_close(target_margins(GAPS, 4.0, iterations=1), torch.full((4,), 4.0))


def test_one_step_by_hand():
    gaps, gamma0, tau = torch.tensor([0.0, 2.0], dtype=torch.float64), 1.0, 1.0
    slope = 1 / (1 + torch.exp(gaps - gamma0))  # the entropy part is the same for both at the start
    p = torch.softmax(-0.5 * slope, 0)
    torch.testing.assert_close(target_margins(gaps, gamma0, tau, iterations=2), 2 * p, atol=1e-8, rtol=0)


def test_past_gaps_join_the_set_but_not_the_result():
    margins = target_margins(GAPS, 4.0, past_gaps=torch.tensor([-9.0, 9.0]))
    assert margins.shape == (4,)
    everyone = target_margins(torch.cat([GAPS, torch.tensor([9.0, -9.0])]), 4.0)
    torch.testing.assert_close(margins, everyone[:4])


def test_nan_is_left_out_and_large_gaps_do_not_overflow():
    margins = target_margins(torch.tensor([1.0, math.nan, 3.0]), 4.0)
    assert margins[1] == 4.0
    torch.testing.assert_close(margins[[0, 2]], target_margins(torch.tensor([1.0, 3.0]), 4.0))
    assert torch.isfinite(target_margins(torch.tensor([1e4, -1e4, 0.0]), 4.0)).all()
    assert target_margins(torch.tensor([math.nan]), 4.0).tolist() == [4.0]


def test_twenty_steps_lose_no_precision_in_float32():
    gaps = torch.from_numpy(np.random.default_rng(0).normal(scale=8.0, size=32)).float()
    margins, exact = target_margins(gaps, 5.0, tau=3.0), target_margins(gaps.double(), 5.0, tau=3.0)
    assert margins.dtype == torch.float32
    torch.testing.assert_close(margins.double(), exact, atol=0, rtol=1e-7)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="-1"):
        target_margins(GAPS, 4.0, tau=-1)
    with pytest.raises(ValueError, match="0"):
        target_margins(GAPS, 4.0, iterations=0)


def test_losses():
    gaps, margins = torch.tensor([1.0]), torch.tensor([3.0])
    assert gamma_po_loss(gaps, margins).item() == pytest.approx(math.log1p(math.exp(2.0)))
    assert gamma_po_loss(gaps, margins, gamma0=2.0).item() == pytest.approx(math.log(2.0))


def test_queue_forgets_the_oldest_and_fills_the_set():
    queue = queue_push(queue_push(GapQueue(limit=4), [1.0, math.nan, 2.0]), [3.0, 4.0, 5.0])
    assert queue.gaps.tolist() == [2.0, 3.0, 4.0, 5.0]
    rng = np.random.default_rng(0)
    assert sorted(queue_draw(queue, 3, rng).tolist()) == [2.0, 3.0, 4.0, 5.0]
    assert len(set(queue_draw(queue, 254, rng).tolist())) == 2
    assert len(queue_draw(queue, 256, rng)) == 0
    assert len(queue_draw(queue, 999, rng)) == 0
