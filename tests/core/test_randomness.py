"""Random streams: each has a name, and no two of them meet."""

import ast
from itertools import product
from pathlib import Path

import numpy as np
import pytest

import dsel_trl
from dsel_trl.core.randomness import stream, stream_seed
from tests.runs import make_run

PACKAGE = Path(dsel_trl.__file__).parent
# Draws that belong to no run: the built-in corpus and model, and what builds datasets from a seed that it is given.
OWN_SEEDS = {"data/demo/model.py", "data/demo/corpus.py", "data/build/reward_augmented.py", "core/randomness.py"}


def run(seed=0, **values):
    return make_run(4, seed=seed, **values)


def first(generator):
    return generator.integers(2**63)


def test_a_stream_is_the_same_for_the_same_name_and_key():
    assert first(run(3).rng("random/keep", 1)) == first(run(3).rng("random/keep", np.int64(1)))
    assert stream_seed(3, "random/keep", 1) == stream_seed(3, "random/keep", 1) < 2**31


def test_no_two_streams_meet():
    """Among them pairs that are one to `default_rng`: trailing zeros, and numbers of more than 32 bits."""
    keys = [(), (0,), (0, 0), (1,), (0, 1), (1, 0), (29,), (2**32,), (2**32 + 1,), (1, 1), (-1,)]
    names = ["plan", "random/keep", "curriculum/random", "a", "a/1", ""]
    seeds = [0, 1, 2**32, 2**40 + 1]
    found = {(s, n, k): first(stream(s, n, *k)) for s, n, k in product(seeds, names, keys)}
    assert len(set(found.values())) == len(found) == len(seeds) * len(names) * len(keys)
    assert np.array_equal(np.random.default_rng([1]).random(3), np.random.default_rng([1, 0]).random(3))


def test_the_plan_of_an_epoch_is_no_stream_of_a_method():
    """`rng(29)` was once the plan of epoch 29, and the order that a curriculum drew."""
    planned = {first(run(0, epoch=epoch, plans_made=made).plan_rng()) for epoch in range(40) for made in range(3)}
    assert len(planned) == 120
    assert not planned & {first(run().rng("curriculum/random", key)) for key in range(40)}
    assert first(run().plan_rng()) == first(run().rng("plan", 0, 0))
    assert first(run().plan_rng("margin/unseen")) != first(run().plan_rng("loss/unseen"))


@pytest.mark.parametrize("wrong", [(), (7,), (7, "random/keep"), ("random/keep", "epoch"), ("random/keep", 1.5)])
def test_a_stream_without_a_name_is_an_error(wrong):
    with pytest.raises(TypeError):
        run().rng(*wrong)


def calls(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            yield node


def name_of(node):
    """The name that a call of `rng` begins with, `{}` for what an f-string fills in."""
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
    return node.value if isinstance(node, ast.Constant) else None


def test_every_draw_of_the_package_has_a_name_of_its_own():
    names = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for call in calls(path):
            if call.func.attr in ("rng", "stream_seed", "plan_rng") and path.parent.name != "core":
                name = name_of(call.args[0])
                assert isinstance(name, str), f"{path.name}:{call.lineno}"
                assert name.startswith((f"{path.stem}/", "{}/")), f"{path.name}:{call.lineno} draws from {name!r}"
                names.setdefault(name, []).append(path.name)
    assert len(names) > 15
    assert not {name: where for name, where in names.items() if len(where) > 1}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_generator_is_made_beside_the_streams(path):
    """Formulas take a generator or a seed; what they make of a seed that they are given is theirs."""
    if path.parts[len(PACKAGE.parts)] == "functional" or str(path.relative_to(PACKAGE)) in OWN_SEEDS:
        return
    assert not [
        call.lineno for call in calls(path) if call.func.attr in ("default_rng", "RandomState", "SeedSequence")
    ]
