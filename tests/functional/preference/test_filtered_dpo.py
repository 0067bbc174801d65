import math

import pytest

from dsel_trl.functional.preference.filtered_dpo import surviving_ids, teaches

NAN = math.nan


def test_a_pair_teaches_while_the_chosen_answer_is_better():
    assert teaches([0.1, 0.9, 0.5, NAN, 0.1], [0.5, 0.5, 0.5, 0.5, NAN]).tolist() == [True, False, False, False, False]
    assert teaches([0.9], [0.5], threshold=0.5).tolist() == [True]
    assert teaches([math.inf, math.inf], [math.inf, 0.0]).tolist() == [False, False]
    with pytest.raises(ValueError, match="1 generated rewards do not match 2"):
        teaches([1.0], [1.0, 2.0])


def test_dropped_ids_leave_unless_nothing_would_stay():
    assert surviving_ids([3, 7, 9], [True, False, True]).tolist() == [3, 9]
    assert surviving_ids([3, 7, 9], [False, False, False]).tolist() == [3, 7, 9]
