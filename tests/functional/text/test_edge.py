import numpy as np
import pytest

from dsel_trl.functional.text.edge import edge_scores, guideline_effect, mean_turn_nll


def test_mean_turn_nll():
    means, counts = mean_turn_nll([1.0, 5.0, 3.0], [0, 2, 0], 3)
    np.testing.assert_allclose(means, [2.0, np.nan, 5.0])
    assert counts.tolist() == [2, 0, 1]
    assert mean_turn_nll([], [], 0)[0].tolist() == []


def test_effect_by_hand():
    without, guided = [2.0, 1.0, 0.0, np.nan], [1.0, 2.0, 0.0, 1.0]
    np.testing.assert_allclose(guideline_effect(without, guided), [2.0, 0.5, 1.0, np.nan])
    np.testing.assert_allclose(guideline_effect(without, guided, "diff"), [1.0, -1.0, 0.0, np.nan])


def test_empty_guideline_and_unit():
    losses = np.array([0.2, 3.0])
    assert guideline_effect(losses, losses).tolist() == [1.0, 1.0]
    np.testing.assert_allclose(guideline_effect(3 * losses, 3 * losses[::-1]), guideline_effect(losses, losses[::-1]))


def test_aggregates():
    effect, owner, tokens = [1.0, 3.0, np.nan, 2.0], [0, 0, 0, 2], [3, 1, 0, 4]
    np.testing.assert_allclose(edge_scores(effect, owner, 3), [2.0, np.nan, 2.0])
    np.testing.assert_allclose(edge_scores(effect, owner, 3, aggregate="min_turn"), [1.0, np.nan, 2.0])
    token_mean = edge_scores(effect, owner, 3, aggregate="mean_token", num_tokens=tokens)
    np.testing.assert_allclose(token_mean, [1.5, np.nan, 2.0])


def test_errors_name_the_value():
    with pytest.raises(ValueError, match="product"):
        guideline_effect([1.0], [1.0], "product")
    with pytest.raises(ValueError, match=r"\(1,\) and \(2,\)"):
        guideline_effect([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="max_turn"):
        edge_scores([1.0], [0], 1, aggregate="max_turn")
    with pytest.raises(ValueError, match="num_tokens"):
        edge_scores([1.0], [0], 1, aggregate="mean_token")
