import math

import pytest

from dsel_trl.functional.preference.curry_dpo import (
    by_falling_gap,
    curriculum_pairs,
    curriculum_stages,
    rank_responses,
    split_stages,
)

NAN = math.nan


def test_the_best_response_against_each_other_one():
    assert curriculum_pairs([4.0, 1.0, 3.0]) == [(0, 1, 3.0), (0, 2, 1.0)]
    assert rank_responses([4.0, 1.0, NAN, 4.0]).tolist() == [0, 3, 1]


@pytest.mark.parametrize("scores", [[], [1.0], [1.0, NAN], [2.0, 2.0], [NAN, NAN]])
def test_prompts_without_a_pair(scores):
    assert curriculum_pairs(scores) == []


def test_ties():
    # Both best: the lower index is chosen, the other gives no pair. Both worst: the lower index comes first.
    assert curriculum_pairs([1.0, 5.0, 1.0, 5.0]) == [(1, 0, 4.0), (1, 2, 4.0)]


def test_stages():
    pairs = [curriculum_pairs([4.0, 1.0, 3.0]), curriculum_pairs([1.0, NAN]), curriculum_pairs([0.0, 3.0])]
    assert curriculum_stages(pairs) == [[(0, (0, 1, 3.0)), (2, (1, 0, 3.0))], [(0, (0, 2, 1.0))]]
    assert curriculum_stages([]) == []


def test_an_empty_stage_is_a_stage():
    # The second and third best are as good as the best: they are no rivals, and the last stages have no pair.
    assert curriculum_stages([curriculum_pairs([3.0, 3.0, 1.0])], 2) == [[(0, (0, 2, 2.0))], []]


def test_pairs_by_falling_gap():
    assert by_falling_gap([0.5, 3.0, 0.0, NAN, 3.0, -1.0]).tolist() == [1, 4, 0]
    assert by_falling_gap([]).tolist() == []


def test_equal_stages_of_single_pairs():
    stages = split_stages([0.5, 3.0, 0.0, 1.0, NAN, 2.0, -1.0, 4.0], n_stages=3)
    assert [stage.tolist() for stage in stages] == [[7, 1], [5, 3], [0]]
    assert split_stages([1.0, 2.0], n_stages=1)[0].tolist() == [1, 0]
    with pytest.raises(ValueError, match="0"):
        split_stages([1.0], n_stages=0)
