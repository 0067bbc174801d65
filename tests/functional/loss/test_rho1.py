import pytest
import torch

from dsel_trl.functional.loss.rho1 import excess_loss, select_tokens, selected_token_weights

LOSS = torch.tensor([[1.0, 4.0, 2.0, 3.0], [5.0, 0.5, 6.0, 7.0]])
REF = torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
MASK = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0]]).bool()


def mean_of(selected, **options):
    return (selected_token_weights(selected, **options) * LOSS).sum()


def test_by_hand():
    excess = excess_loss(LOSS, REF)
    assert excess.tolist() == [[0, 3, 1, 2], [4, -0.5, 5, 6]]
    batch = select_tokens(excess, MASK, 0.6)
    assert batch.int().tolist() == [[0, 1, 0, 1], [1, 0, 0, 0]]
    assert mean_of(batch).item() == 4.0
    per_row = select_tokens(excess, MASK, 0.6, scope="sequence")
    assert per_row.int().tolist() == [[0, 1, 0, 0], [1, 0, 0, 0]]
    assert mean_of(per_row).item() == 4.5
    assert mean_of(per_row, n_selected=4).item() == 2.25
    assert mean_of(per_row, n_tokens=8).item() == 36.0


@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_ratio_one_is_the_ordinary_mean(scope):
    selected = select_tokens(excess_loss(LOSS, REF), MASK, 1.0, scope)
    assert torch.equal(selected, MASK)
    torch.testing.assert_close(mean_of(selected), LOSS[MASK].mean())


@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_counts_and_mask(scope):
    generator = torch.Generator().manual_seed(0)
    excess = torch.randn(6, 40, generator=generator)
    mask = torch.rand(6, 40, generator=generator) < 0.5
    mask[3] = False
    for ratio in (0.01, 0.29, 0.7, 1.0):
        selected = select_tokens(excess, mask, ratio, scope)
        assert not (selected & ~mask).any()
        n_valid = mask.sum(1).tolist() if scope == "sequence" else [int(mask.sum())]
        assert selected.sum().item() == sum(max(1, int(ratio * n + 1e-9)) for n in n_valid if n)


def test_ties_go_to_the_earlier_token():
    selected = select_tokens(torch.zeros(2, 3), torch.ones(2, 3), 0.5)
    assert selected.int().tolist() == [[1, 1, 1], [0, 0, 0]]


def test_non_finite_excess_is_never_selected():
    excess = torch.tensor([[float("nan"), float("inf"), 1.0, 2.0]])
    assert select_tokens(excess, torch.ones(1, 4), 1.0).int().tolist() == [[0, 0, 1, 1]]


def test_nothing_valid_gives_weight_zero():
    selected = select_tokens(torch.zeros(1, 3), torch.zeros(1, 3))
    assert not selected.any()
    assert selected_token_weights(selected, n_tokens=3).tolist() == [[0, 0, 0]]


def test_weights_make_the_mean_over_all_tokens_that_over_the_selected():
    selected = select_tokens(excess_loss(LOSS, REF), MASK, 0.6)
    weights = selected_token_weights(selected, n_tokens=int(MASK.sum()))
    torch.testing.assert_close((weights * LOSS)[MASK].mean(), LOSS[selected].mean())
    assert selected_token_weights(torch.ones(7, dtype=torch.bool), n_tokens=7).tolist() == [1.0] * 7


def test_half_precision_is_upcast():
    assert excess_loss(LOSS.bfloat16(), REF.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(
    ("ratio", "scope", "message"), [(0.0, "batch", "0.0"), (1.1, "batch", "1.1"), (0.5, "row", "row")]
)
def test_errors_name_the_value(ratio, scope, message):
    with pytest.raises(ValueError, match=message):
        select_tokens(torch.zeros(1, 2), torch.ones(1, 2), ratio, scope)


def test_shape_errors():
    with pytest.raises(ValueError, match="shape"):
        excess_loss(torch.zeros(1, 2), torch.zeros(1, 3))
    with pytest.raises(ValueError, match="shape"):
        select_tokens(torch.zeros(1, 2), torch.zeros(1, 3))
