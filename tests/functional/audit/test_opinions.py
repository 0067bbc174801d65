"""Cross-fitted opinions: no pair is judged by a model that knows its label, and the sides are treated alike."""

import numpy as np
import pytest

from dsel_trl.functional.audit.opinions import group_folds, linear_opinions, ridge_opinions, tree_opinions

SIZE, FOLDS = 300, 5


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(SIZE, 4)).astype(np.float32)
    # The first column tells the truth where the pair is of the first kind, the second where it is of the other.
    kind = rng.random(SIZE) < 0.5
    better = np.where(kind, truth[:, 0], truth[:, 1]) > 0
    wrong = rng.random(SIZE) < 0.15
    sign = np.where(better ^ wrong, 1, -1)[:, None]
    fold = group_folds(np.arange(SIZE), FOLDS, rng)
    return truth * sign, kind[:, None].astype(np.float32), fold, wrong


def auc(opinions, wrong):
    return np.mean(opinions[wrong][:, None] < opinions[~wrong][None])


def test_folds_hold_prompts_together():
    groups = np.repeat(np.arange(40), np.arange(40) % 5 + 1)
    fold = group_folds(groups, 4, np.random.default_rng(0))
    assert all(len(set(fold[groups == group])) == 1 for group in range(40))
    sizes = np.bincount(fold, minlength=4)
    assert sizes.max() - sizes.min() <= 5
    with pytest.raises(ValueError, match="same prompt"):
        group_folds(np.zeros(5, dtype=np.int64), 2, np.random.default_rng(0))


def test_ridge_is_the_solution_without_the_fold(data):
    differences, _, fold, wrong = data
    held_out, nested = ridge_opinions(differences, fold, ridges=(0.1,))
    scaled = differences / np.sqrt((differences.astype(np.float64) ** 2).mean(axis=0))
    for left_out, row in (((2,), held_out), ((2, 4), nested[4])):
        rest = scaled[~np.isin(fold, left_out)]
        gram = rest.T @ rest
        weights = np.linalg.solve(gram + 0.1 * np.trace(gram) / 4 * np.eye(4), rest.sum(axis=0))
        assert row[fold == 2] == pytest.approx(scaled[fold == 2] @ weights, abs=1e-4)
    assert auc(held_out, wrong) > 0.7


def test_products_and_trees_see_kinds_apart(data):
    differences, kind, fold, wrong = data
    none = np.zeros((0, FOLDS, SIZE), dtype=np.float32)
    plain = auc(linear_opinions(differences, none, np.zeros((SIZE, 1)), fold), wrong)
    assert auc(linear_opinions(differences, none, kind, fold), wrong) > plain + 0.05
    pytest.importorskip("sklearn")
    assert auc(tree_opinions(differences, none, kind, fold, seed=0, trees=60), wrong) > plain + 0.05


def test_the_own_label_and_the_order_of_the_sides_have_no_part_in_an_opinion(data):
    """Turned over, a pair of the fold that is judged turns its opinion over, and nothing else changes."""
    pytest.importorskip("sklearn")
    differences, kind, fold, _ = data
    turned = np.where((fold == 1)[:, None], -differences, differences)
    none = np.zeros((0, FOLDS, SIZE), dtype=np.float32)
    for opinions in (
        lambda d: ridge_opinions(d, fold)[0],
        lambda d: linear_opinions(d, none, kind, fold),
        lambda d: tree_opinions(d, none, kind, fold, seed=0, trees=10),
    ):
        before, after = opinions(differences), opinions(turned)
        assert after[fold == 1] == pytest.approx(-before[fold == 1], abs=1e-4)
