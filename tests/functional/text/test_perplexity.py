import math

import numpy as np
import pytest

from dsel_trl.functional.text.perplexity import perplexity, perplexity_band

VALUES = [50.0, 10.0, 40.0, 20.0, 30.0]


def test_perplexity():
    np.testing.assert_allclose(perplexity([0.0, math.log(7), 1000.0]), [1.0, 7.0, np.inf])


@pytest.mark.parametrize(
    ("fraction", "band", "expected"),
    [
        (0.4, "low", [1, 3]),
        (0.4, "high", [0, 2]),
        (0.4, "mid", [3, 4]),
        (0.6, "mid", [2, 3, 4]),
        (0.01, "mid", [4]),
        (1.0, "low", [0, 1, 2, 3, 4]),
    ],
)
def test_by_hand(fraction, band, expected):
    assert perplexity_band(VALUES, fraction, band).tolist() == expected


def test_unknown_values_do_not_shift_the_middle():
    assert perplexity_band([*VALUES, np.nan, np.inf], 0.4, "mid").tolist() == [3, 4]


def test_ties_go_to_the_lower_id():
    assert perplexity_band([1.0, 1.0, 1.0, 1.0], 0.5, "high").tolist() == [0, 1]
    assert perplexity_band([1.0, 1.0, 1.0, 1.0], 0.5, "low").tolist() == [0, 1]


def test_errors_name_the_value():
    with pytest.raises(ValueError, match="middle"):
        perplexity_band(VALUES, 0.5, "middle")
    with pytest.raises(ValueError, match=r"1\.5"):
        perplexity_band(VALUES, 1.5)
