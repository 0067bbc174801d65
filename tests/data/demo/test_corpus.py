"""The demo corpus: its truth is true, its test split is clean, and the same seed gives the same rows."""

import re

import numpy as np
import pytest

from dsel_trl.data.demo.corpus import FAMILIES, LEVELS, demo_completions, demo_judged, demo_preferences, draw_tasks


@pytest.fixture(scope="module")
def corpus():
    return demo_preferences(seed=3, train_size=640, test_size=128)


def prompts(split):
    return [messages[0]["content"] for messages in split["prompt"]]


def answers(split, column):
    return [messages[0]["content"] for messages in split[column]]


def right_answers(split):
    """The correct answer of each row, by what the truth column says."""
    return [
        rejected if flipped else chosen
        for chosen, rejected, flipped in zip(
            answers(split, "chosen"), answers(split, "rejected"), split["truth_flipped"], strict=True
        )
    ]


def plain(prompt):
    return prompt.removeprefix("Please: ").removeprefix("Hello. ").removesuffix(" Thank you!")


def test_same_seed_same_rows_other_seed_other_rows(corpus):
    again = demo_preferences(seed=3, train_size=640, test_size=128)
    assert all(again[split].to_list() == corpus[split].to_list() for split in corpus)
    assert prompts(demo_preferences(seed=4, train_size=640, test_size=128)["train"]) != prompts(corpus["train"])


def test_global_generators_are_left_alone():
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    demo_preferences(train_size=64, test_size=32)
    assert (np.random.get_state()[1] == state).all()  # noqa: NPY002


def test_held_out_pairs_are_clean_and_their_prompts_are_new(corpus):
    test = corpus["test"]
    assert not any(test["truth_flipped"])
    assert set(test["truth_duplicate_of"]) == {-1}
    assert not {plain(p) for p in prompts(corpus["train"])} & {plain(p) for p in prompts(test)}


def test_rates_of_flips_and_duplicates(corpus):
    train = corpus["train"]
    assert 0.22 < np.mean(train["truth_flipped"]) < 0.38
    assert np.mean(np.array(train["truth_duplicate_of"]) >= 0) == pytest.approx(0.1)
    assert len(set(prompts(train))) == len(train)


def test_a_duplicate_repeats_its_original_in_other_words(corpus):
    train = corpus["train"]
    texts, right = prompts(train), right_answers(train)
    rows = [(row, original) for row, original in enumerate(train["truth_duplicate_of"]) if original >= 0]
    assert len(rows) == 64
    for row, original in rows:
        assert texts[row] != texts[original]
        assert plain(texts[row]) == texts[original]
        assert right[row] == right[original]


def test_families_and_levels_come_in_equal_shares(corpus):
    test = corpus["test"]
    cells = set(zip(test["truth_family"], test["truth_difficulty"], strict=True))
    assert cells == {(family, level) for family in FAMILIES for level in LEVELS}


def test_scores_tell_right_from_wrong_most_of_the_time_and_less_when_hard():
    train = demo_preferences(seed=0, train_size=4096, test_size=32)["train"]
    margin = np.array(train["score_chosen"]) - np.array(train["score_rejected"])
    says_right = (margin > 0) == ~np.array(train["truth_flipped"])
    level = np.array(train["truth_difficulty"])
    assert 0.8 < says_right.mean() < 0.95
    assert says_right[level == 1].mean() > says_right[level == 4].mean() + 0.05


@pytest.mark.parametrize(
    ("family", "solve"),
    [
        ("sort", lambda prompt: " ".join(sorted(re.findall(r"\d", prompt)))),
        ("add", lambda prompt: f"This makes {sum(map(int, re.findall(r'[0-9]+', prompt)))}."),
        ("copy", lambda prompt: prompt.split(": ")[1]),
        ("count", lambda prompt: " ".join([prompt.rstrip(".").split()[-1]] * int(re.findall(r"\d+", prompt)[0]))),
        ("number", lambda prompt: "It is" if " 1 " in prompt else "They are"),
        ("address", lambda prompt: "Dear" if re.search("doctor|judge|mayor", prompt) else "Hey"),
        ("refuse", lambda prompt: "Sorry" if re.search("steal|break|burn", prompt) else "Take"),
        ("format", lambda prompt: {"quotes": '"', "brackets": "(", "stars": "*"}[prompt.split()[2].rstrip(":")]),
    ],
)
def test_the_answer_marked_correct_is_correct_and_the_other_is_not(family, solve):
    rng = np.random.default_rng(1)
    for level in LEVELS * 10:
        prompt, good, bad = FAMILIES[family](rng, level)
        assert good.startswith(solve(prompt)), (prompt, good)
        assert good != bad
        if family in ("sort", "add", "copy", "count"):
            assert good == solve(prompt)
        else:
            assert not bad.startswith(solve(prompt)), (prompt, bad)


def test_every_family_is_checked_above():
    assert set(FAMILIES) == {"sort", "add", "copy", "count", "number", "address", "refuse", "format"}


def test_drawing_more_prompts_than_there_are_is_an_error(monkeypatch):
    monkeypatch.setattr("dsel_trl.data.demo.corpus.FAMILIES", {"fixed": lambda rng, level: (f"p{level}", "a", "b")})
    with pytest.raises(ValueError, match="family 'fixed', level 1"):
        draw_tasks(5, np.random.default_rng(0), set())


def test_completions_are_the_chosen_answers():
    pairs, completions = demo_preferences(1, 64, 16), demo_completions(1, 64, 16)
    assert completions["train"]["completion"][:] == pairs["train"]["chosen"][:]
    assert completions["train"]["score"][:] == pairs["train"]["score_chosen"][:]
    assert "rejected" not in completions["test"].column_names


def test_judged_responses_are_wrongly_labelled_where_a_pair_is_flipped(corpus):
    judged = demo_judged(seed=3, train_size=640, test_size=128)
    for split, pairs in corpus.items():
        rows = judged[split]
        assert rows["prompt"] == pairs["prompt"]
        assert sum(rows["label"]) == len(rows) // 2
        right = [
            said == answer for said, answer in zip(answers(rows, "completion"), right_answers(pairs), strict=True)
        ]
        wrongly = [label != correct for label, correct in zip(rows["label"], right, strict=True)]
        assert wrongly == pairs["truth_flipped"]
    sides = [("chosen", "rejected")[row % 2] for row in range(640)]
    assert judged["train"]["score"] == [row[f"score_{side}"] for row, side in zip(corpus["train"], sides, strict=True)]
