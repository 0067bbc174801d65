"""The figures on a card: their words, their conditions, and that every method's name what there is."""

from types import SimpleNamespace

import pytest

from dsel_trl import Method, create_method, get_method, list_methods
from dsel_trl.core.charges import NOUNS, PARTS, Charge, charged
from dsel_trl.core.costs import WORK


def test_the_words_say_the_figures():
    assert str(Charge("forwards")) == "1 forward per example"
    assert str(Charge("helper_trainings", "n / 2", when="source: cross", reference=True)) == (
        "n / 2 helper trainings with reference per example (source: cross)"
    )
    assert str(Charge("rewards", "2", per="row", at_most=True)) == "at most 2 rewards per row"


def test_the_card_is_made_of_the_figures():
    class One(Method):
        charges = (Charge("forwards", "2"),)

    class Two(One):
        cost = "a CPU second"

    class Three(Two):
        pass

    assert One.cost == "2 forwards per example"
    assert Two.cost == Three.cost == "a CPU second; 2 forwards per example"
    assert Method.cost == "no extra forward"


@pytest.mark.parametrize(
    ("when", "applies"),
    [
        ("", True),
        ("on", True),
        ("no on", False),
        ("off", False),
        ("source: model", True),
        ("source: policy", False),
        ("both: b", True),
        ("off and on", False),
        ("off or on", True),
        ("on and source: model or off", True),
    ],
)
def test_conditions(when, applies):
    method = SimpleNamespace(on=True, off=None, source="model:a/b", both=("a", "b"))
    assert Charge("forwards", when=when).applies(method) is applies


def test_amounts_are_read_from_left_to_right():
    method = SimpleNamespace(helpers=3, times=5)
    assert Charge("forwards", "helpers * times / 2").value(method) == 7.5
    assert Charge("forwards", "helpers + times * 2").value(method) == 16
    assert Charge("forwards", "0.5").value(method) == 0.5


def test_a_training_is_a_forward_and_a_backward_and_asks_the_reference_where_there_is_one():
    charges = (Charge("helper_trainings", "2", reference=True), Charge("helper_forwards", at_most=True))
    with_reference = charged(charges, None, {"example": 10}, True)
    assert with_reference == {
        "helper_forwards": (20, 30),
        "helper_backwards": (20, 20),
        "helper_reference_forwards": (20, 20),
    }
    assert "helper_reference_forwards" not in charged(charges, None, {"example": 10}, False)
    # A run with precomputed log-probabilities: its helpers ask their own start all the same.
    precomputed = charged((*charges, Charge("forwards", reference=True)), None, {"example": 10}, False, True)
    assert precomputed["helper_reference_forwards"] == (20, 20)
    assert "reference_forwards" not in precomputed


@pytest.mark.parametrize("name", list_methods())
def test_what_a_method_charges_exists(name):
    cls = get_method(name)
    for charge in cls.charges:
        assert charge.what in NOUNS
        assert str(charge) in cls.cost
        words = [word for word in charge.amount.split() if word.isidentifier()]
        for part in charge.when.replace(" or ", " and ").split(" and "):
            words.append(part.partition(": ")[0].removeprefix("no "))
        for word in filter(None, words):
            assert word in getattr(cls, "__dataclass_fields__", {}) or hasattr(cls, word), word
    assert (set(NOUNS) - set(PARTS)) | {part for parts in PARTS.values() for part in parts} <= set(WORK)


@pytest.mark.parametrize(("epochs", "pairs"), [(1, 2.9), (2, 3.4)])
def test_selective_dpo_online_scores_what_its_card_says(epochs, pairs):
    size, steps = 6400, 100
    run = SimpleNamespace(
        size=size,
        trainer="dpo",
        world=1,
        epochs=epochs,
        max_steps=steps * epochs,
        arguments=SimpleNamespace(per_device_train_batch_size=8, gradient_accumulation_steps=4),
    )
    expected = create_method("selective_dpo", source="online").expected_cost(run)
    assert expected["forwards"] == expected["reference_forwards"]
    assert expected["forwards"][0] / size == pytest.approx(pairs)
    assert f"{pairs}" in get_method("selective_dpo").__doc__
