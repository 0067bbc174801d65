import copy
import math

import numpy as np
import pytest

from dsel_trl.functional.preference.reward_augmented import (
    add_goal,
    augmentable,
    format_score,
    goal_rows,
    goal_text,
    implicit_scores,
)

TEMPLATE = "Quality: {g}."
USER = {"role": "user", "content": "Q"}
SYSTEM = {"role": "system", "content": "Be kind."}
GOOD, BAD = {"role": "assistant", "content": "good"}, {"role": "assistant", "content": "bad"}


def test_scores_print_as_in_the_reference():
    assert [format_score(score) for score in (9.0, 6.5, 10, 0.0)] == ["9", "6.5", "10", "0"]
    with pytest.raises(ValueError, match="nan"):
        format_score(math.nan)


def test_template_needs_a_slot():
    assert goal_text(9.0, TEMPLATE) == "Quality: 9."
    with pytest.raises(ValueError, match="'Quality'"):
        goal_text(9.0, "Quality")


def test_several_attributes_are_one_goal():
    assert goal_text({"helpfulness": 4.0, "verbosity": 2.5}, TEMPLATE) == "Quality: helpfulness 4, verbosity 2.5."
    with pytest.raises(ValueError, match="at least one"):
        goal_text({}, TEMPLATE)
    with pytest.raises(ValueError, match="nan"):
        goal_text({"helpfulness": math.nan}, TEMPLATE)


def test_the_mean_of_the_attributes_says_the_order():
    high = [[4, 1], [1, 1], [4, 2], [3, 3], [5, math.nan], [math.inf, 1]]
    low = [[1, 3], [4, 1], [2, 4], [3, 3], [1, 1], [math.inf, 1]]
    # The third pair has one mean on both sides, but asks for two things.
    assert augmentable(high, low).tolist() == [0, 2]
    assert augmentable(high, low, keep_equal=True).tolist() == [0, 2, 3]


def test_goal_goes_into_a_system_message():
    assert add_goal([USER, GOOD], "G") == [{"role": "system", "content": "G"}, USER, GOOD]
    merged = add_goal([SYSTEM, USER], "G")
    assert merged == [{"role": "system", "content": "G\n\nBe kind."}, USER]
    assert len(add_goal([SYSTEM, USER], "G", existing_system="insert")) == 3


def test_goal_goes_into_the_first_user_message_without_system_role():
    second = {"role": "user", "content": "Q2"}
    conditioned = add_goal([USER, GOOD, second], "G", system_role=False)
    assert conditioned == [{"role": "user", "content": "G\n\nQ"}, GOOD, second]
    with pytest.raises(ValueError, match="assistant"):
        add_goal([GOOD], "G", system_role=False)


@pytest.mark.parametrize("system_role", [True, False])
def test_the_negative_row_is_reversed_and_nothing_is_changed_in_place(system_role):
    chosen, rejected = [USER, GOOD], [USER, BAD]
    before = copy.deepcopy((chosen, rejected))
    positive, negative = goal_rows({"chosen": chosen, "rejected": rejected}, 9.0, 4.0, TEMPLATE, system_role)
    assert (chosen, rejected) == before
    assert (positive["chosen"][-1], positive["rejected"][-1]) == (GOOD, BAD)
    assert (negative["chosen"][-1], negative["rejected"][-1]) == (BAD, GOOD)
    assert positive["chosen"][:-1] == positive["rejected"][:-1]
    assert "Quality: 9." in positive["chosen"][0]["content"]
    assert negative["chosen"][0]["content"].count("Quality: 4.") == 1


@pytest.mark.parametrize("prompt", ["Q", [USER]])
def test_a_prompt_of_its_own_carries_the_goal(prompt):
    row = {"prompt": prompt, "chosen": "good", "rejected": "bad", "source": "s"}
    positive, negative = goal_rows(row, 9.0, 4.0, TEMPLATE, system_role=False)
    assert positive == {**row, "prompt": add_goal(prompt, "Quality: 9.", system_role=False)}
    swapped = {"prompt": add_goal(prompt, "Quality: 4.", system_role=False), "chosen": "bad", "rejected": "good"}
    assert negative == {**row, **swapped}
    assert add_goal("Q", "G") == "G\n\nQ"


def test_the_shipped_defect_is_an_option():
    row = {"chosen": [USER, GOOD], "rejected": [USER, BAD]}
    _, negative = goal_rows(row, 9.0, 4.0, TEMPLATE, system_role=False, as_shipped=True)
    assert (negative["chosen"][-1], negative["rejected"][-1]) == (GOOD, BAD)
    assert negative["rejected"][0]["content"].count("Quality: 4.") == 2


def test_augmentable_pairs():
    chosen, rejected = [5.0, 3.0, 2.0, math.nan, 4.0], [1.0, 3.0, 4.0, 1.0, math.inf]
    assert augmentable(chosen, rejected).tolist() == [0]
    assert augmentable(chosen, rejected, keep_equal=True).tolist() == [0, 1]


def test_half_keeps_the_size_of_the_data():
    high, low = np.ones(10), np.zeros(10)
    ids = augmentable(high, low, half=True, rng=np.random.default_rng(0))
    assert len(set(ids.tolist())) == 5
    with pytest.raises(ValueError, match="rng"):
        augmentable(high, low, half=True)


def test_implicit_scores_spread_ranks_over_the_scale():
    np.testing.assert_allclose(implicit_scores([0.3, -1.0, math.nan, 7.0]), [5.5, 1.0, math.nan, 10.0])
    assert implicit_scores([0.3]).tolist() == [1.0]
