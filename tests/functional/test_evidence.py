import math

import numpy as np
import pytest

from dsel_trl.functional.evidence import (
    dense_rank,
    efficiency,
    feasibility_ranks,
    flexibility_penalty,
    improvement_ratio,
    selected_fraction,
    simplicity_penalty,
)

PUBLISHED = {
    "AlpaGasus": (0.173, 1.284),
    "Superfiltering": (0.05, 1.475),
    "InsTag": (0.02, 1.344),
    "DEITA": (0.1, 1.426),
    "InstructionGPT-4": (0.058, 1.443),
    "Nuggets": (0.145, 1.519),
    "IFD": (0.05, 1.747),
    "LESS": (0.05, 1.491),
    "Instruction-Mining": (0.025, 1.400),
    "SHED": (0.09, 1.460),
    "CaR": (0.0196, 1.343),
    "SelectIT": (0.2, 1.653),
}


def test_published_order():
    points = np.array(list(PUBLISHED.values()))
    ranks = dict(
        zip(PUBLISHED, dense_rank(efficiency(points[:, 0], points[:, 1]), descending=True).tolist(), strict=True)
    )
    expected = {
        "IFD": 1,
        "LESS": 2,
        "Superfiltering": 3,
        "SelectIT": 4,
        "InstructionGPT-4": 5,
        "Instruction-Mining": 5,
    }
    expected |= {"SHED": 6, "Nuggets": 7, "InsTag": 8, "CaR": 9, "DEITA": 10, "AlpaGasus": 11}
    assert ranks == expected


def test_improvement_ratio():
    assert improvement_ratio([1.2, 1.4], [1.0]) == pytest.approx(1.3)
    assert improvement_ratio([2.0, 9.0], [1.0, 3.0]) == pytest.approx(2.5)
    assert improvement_ratio([0.949], [1.0], "same_benchmark") == pytest.approx(1.284)
    assert improvement_ratio([1.0], [1.0], "other_benchmark") == pytest.approx(1.426)
    assert math.isnan(improvement_ratio([0.0], [1.0], "same_benchmark"))
    assert improvement_ratio([0.0], [1.0]) == 0


def test_penalties():
    assert simplicity_penalty(2, 5, True) == 9
    assert simplicity_penalty(0, 2, False) == 3
    assert simplicity_penalty(1, 3, True, model_weight=1.5) == 4.5
    assert simplicity_penalty(100, 4, True) == 204
    assert simplicity_penalty(101, 4, True) == 200
    assert flexibility_penalty(False, False, False) == 6
    assert flexibility_penalty(True, False, True) == 2


def test_ranks():
    assert dense_rank([3.0, 1.0, 1.0 + 1e-9, 2.0]).tolist() == [3, 1, 1, 2]
    assert dense_rank([3.0, 1.0], descending=True).tolist() == [1, 2]
    assert [r.tolist() for r in feasibility_ranks([5, 1, 1], [0, 2, 0])] == [[2, 1, 1], [1, 2, 1], [2, 2, 1]]


def test_fraction():
    assert selected_fraction(5, 20) == 0.25


def test_errors_name_the_value():
    with pytest.raises(ValueError, match="3 selected scores; got 2"):
        improvement_ratio([1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match=r"got \[1\.0, 0\.0\]"):
        improvement_ratio([1, 2], [1, 0])
    with pytest.raises(ValueError, match="elo"):
        improvement_ratio([1.0], [1.0], "elo")
    with pytest.raises(ValueError, match="6 of 5"):
        selected_fraction(6, 5)
