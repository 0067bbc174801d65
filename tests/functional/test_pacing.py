import numpy as np
import pytest

from dsel_trl.functional.pacing import (
    PACINGS,
    competence,
    difficulty_cdf,
    eligible_by_competence,
    pacing_size,
    unigram_rarity,
)


def test_hand_computed_sizes():
    def size(name, step):
        return int(pacing_size(name, step, 100, 1000, initial_fraction=0.2, full_at=0.8))

    assert size("linear", 40) == 600
    assert size("quadratic", 40) == 400
    assert size("root", 20) == 600
    assert size("step", 79) == 200
    assert size("step", 80) == 1000
    assert size("root_p3", 10) == 600
    assert size("log", 0) == 200


@pytest.mark.parametrize("name", [*PACINGS, "root_p4"])
@pytest.mark.parametrize(("full_at", "total"), [(0.8, 100), (0.55, 100), (0.7, 30), (1.0, 7)])
def test_grows_to_everything(name, full_at, total):
    for n in (1, 3, 64, 999):
        sizes = pacing_size(name, np.arange(total + 5), total, n, initial_fraction=0.1, full_at=full_at)
        assert (np.diff(sizes) >= 0).all()
        assert sizes[0] >= 1
        end = round(full_at * total)
        assert (sizes[end:] == n).all()


@pytest.mark.parametrize("name", PACINGS)
def test_everything_at_once(name):
    assert pacing_size(name, [0, 3], 10, 50, full_at=0.0).tolist() == [50, 50]
    assert pacing_size(name, [0, 3], 10, 50, initial_fraction=1.0).tolist() == [50, 50]


def test_competence_bounds_and_values():
    values = competence(np.arange(0, 300, 10), 200)
    assert values[0] == pytest.approx(0.01)
    assert (values[20:] == 1).all()
    assert (np.diff(values) >= 0).all()
    assert competence(50, 100, initial=0.2, power=1) == pytest.approx(0.6)
    assert competence(0, 0) == 1
    assert competence([0, 25, 100], 100, initial=0.0).tolist() == [0.0, 0.5, 1.0]


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("initial", [0.0, 0.01, 0.3, 1.0])
def test_competence_stays_between_its_start_and_one(power, initial):
    values = competence(np.linspace(0, 300, 101), 170, initial=initial, power=power)
    assert values.min() >= initial * (1 - 1e-12)
    assert values.max() == 1
    assert (np.diff(values) >= 0).all()


def test_cdf_counts_ties_and_skips_unknown():
    np.testing.assert_allclose(difficulty_cdf([5.0, 1.0, 1.0, np.nan, 9.0]), [0.75, 0.5, 0.5, np.nan, 1.0])


def test_eligibility():
    cdf = difficulty_cdf([3.0, 1.0, 2.0])
    assert eligible_by_competence(cdf, 0.7).tolist() == [1, 2]
    assert eligible_by_competence(cdf, 0.1).tolist() == [1]
    assert eligible_by_competence(cdf, 0.1, at_least_one=False).tolist() == []


def test_rarity():
    rarity = unigram_rarity([7, 7, 7, 2], [0, 2, 2, 4])
    np.testing.assert_allclose(rarity, [-2 * np.log(0.75), 0.0, -np.log(0.75) - np.log(0.25)])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"name": "cubic"}, "cubic"),
        ({"name": "root_p0"}, "root_p0"),
        ({"name": "log", "initial_fraction": 0.0}, "initial_fraction"),
        ({"name": "log", "full_at": 1.5}, "full_at"),
    ],
)
def test_errors_name_the_value(kwargs, message):
    with pytest.raises(ValueError, match=message):
        pacing_size(step=0, total_steps=10, dataset_size=10, **kwargs)


def test_competence_errors():
    with pytest.raises(ValueError, match="initial"):
        competence(0, 10, initial=-0.1)
    with pytest.raises(ValueError, match="power"):
        competence(0, 10, power=0)
