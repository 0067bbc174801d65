"""Random projections keep inner products, whatever the block, and hang on their seed."""

import pytest
import torch

from dsel_trl.functional.projection import factored, rademacher, signs, stream_of


def vectors(n=6, size=900):
    return torch.randn(n, size, generator=torch.Generator().manual_seed(0))


def test_signs_are_signs_of_their_seed():
    drawn = signs(200, 50, 3)
    assert set(drawn.unique().tolist()) == {-1.0, 1.0}
    assert abs(drawn.mean().item()) < 0.05
    assert torch.equal(drawn, signs(200, 50, 3))
    assert not torch.equal(drawn, signs(200, 50, 4))
    assert len({stream_of(0, "a"), stream_of(0, "b"), stream_of(1, "a"), stream_of(0, "a", 1)}) == 4


@pytest.mark.parametrize("how", ["rademacher", "factored"])
def test_inner_products_are_right_on_average(how):
    given = vectors()
    expected, found = given @ given.T, []
    for seed in range(60):
        rows = rademacher(given, 64, seed) if how == "rademacher" else factored(given.view(6, 30, 30), 64, seed)
        assert rows.shape == (6, 64)
        found.append(rows @ rows.T)
    # 60 draws of relative error sqrt(2 / 64), somewhat more for the cheaper one.
    scale = expected.diagonal().mean()
    torch.testing.assert_close(torch.stack(found).mean(0) / scale, expected / scale, rtol=0, atol=0.15)


def test_a_block_at_a_time_gives_the_same_as_the_matrix():
    given = vectors(size=10)
    whole = torch.cat([signs(4, 8, stream_of(5, 0)), signs(4, 8, stream_of(5, 1)), signs(2, 8, stream_of(5, 2))])
    torch.testing.assert_close(rademacher(given, 8, 5, block=4), given @ whole / 8**0.5)


def test_a_projection_is_linear():
    given = vectors(2, 36)
    for project in (lambda v: rademacher(v, 16, 1), lambda v: factored(v.view(-1, 6, 6), 16, 1)):
        both = project(given)
        torch.testing.assert_close(project(given.sum(dim=0, keepdim=True))[0], both.sum(dim=0))


def test_only_squares_are_projected_from_both_sides():
    with pytest.raises(ValueError, match="size=60 is no square: 64"):
        factored(torch.zeros(1, 4, 4), 60, 0)
