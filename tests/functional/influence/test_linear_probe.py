import numpy as np
import pytest

from dsel_trl.functional.influence.linear_probe import ProbeGame


def game(players, seed=0, **more):
    rng = np.random.default_rng(seed)
    parts = [rng.standard_normal(shape) for shape in ((12, 3), (12, 2), (7, 3), (7, 2))]
    return ProbeGame(*parts, players, **more), parts


@pytest.mark.parametrize("players", [np.arange(12), np.array([2, 0, 1, 1, 0, 2, 2, 2, 0, 1, 0, 0])])
def test_a_set_is_worth_the_held_out_error_that_it_takes_off(players):
    probe, (inputs, targets, held, truth) = game(players, ridge=2.0)
    rng = np.random.default_rng(1)
    order = rng.permutation(len(probe))
    for count, worth in enumerate(probe.growing(order), 1):
        members = np.isin(np.arange(len(probe)), order[:count])
        rows = np.isin(players, order[:count])
        # Ridge regression by least squares on rows that stand for the penalty.
        padded = np.vstack([inputs[rows], np.sqrt(2.0) * np.eye(3)]), np.vstack([targets[rows], np.zeros((3, 2))])
        weights = np.linalg.lstsq(*padded, rcond=None)[0]
        expected = ((truth**2).sum(axis=1) - ((truth - held @ weights) ** 2).sum(axis=1)).mean()
        np.testing.assert_allclose([worth, probe.worth(members)], expected, atol=1e-12)
    assert count == len(probe)
    assert probe.worth(np.zeros(len(probe), dtype=bool)) == 0.0
    assert probe.sizes.tolist() == np.bincount(players).tolist()


def test_what_cannot_be_learned_from_is_refused():
    with pytest.raises(ValueError, match="ridge=0"):
        game(np.arange(12), ridge=0.0)
    with pytest.raises(ValueError, match="not finite"):
        ProbeGame([[np.nan]], [[1.0]], [[1.0]], [[1.0]], [0])
