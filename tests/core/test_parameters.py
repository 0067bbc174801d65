"""One word for one thing: what parameters are called, which of them an action reads, and what numbers they take."""

import ast
import dataclasses
import inspect
import itertools
import re
import sys
from typing import ClassVar

import pytest
from datasets import Dataset

from dsel_trl import Method, create_method, get_method, list_methods, register
from dsel_trl.bases import helper_model
from dsel_trl.core.parameters import check_whole, reads_of, when
from dsel_trl.core.registry import renamed_parameters
from dsel_trl.data.build.continuations import Synthesis

METHODS = list_methods()
PAIRS = Dataset.from_dict({"chosen": ["a"], "rejected": ["b"]})
REWARD = "tests.contract.cases:fewest_words"
# What a method cannot be made without.
REQUIRED = {
    "cosine_relevance": {"target": "demo"},
    "dsir": {"target_column": "domain"},
    "edge": {"guideline": "Answer briefly."},
    "filtered_dpo": {"reward": REWARD},
    "data_shapley": {"target": "demo"},
    "gotd": {"target": "demo"},
    "greats": {"target": "demo"},
    "inco_dpo": {"reward": REWARD},
    "inrun_shapley": {"target": "demo"},
    "jest": {"loss_column": "loss"},
    "jsd_relevance": {"target": "demo"},
    "knn_shapley": {"target": "demo"},
    "less": {"target": "demo"},
    "quad": {"target": "demo"},
    "rho1": {"clean_column": "clean"},
    "seal": {"target": "demo"},
}
RENAMED = [(name, old) for name in METHODS for old in renamed_parameters(get_method(name))]


# ---- Names ----


@pytest.mark.parametrize(("name", "old"), RENAMED)
def test_an_old_name_says_the_new_one(name, old):
    cls = get_method(name)
    new = renamed_parameters(cls)[old].split()[0]
    fields = {f.name for f in dataclasses.fields(cls)}
    assert new in fields
    assert old not in fields
    with pytest.raises(ValueError, match=f"'{old}' of '{name}' was renamed: use '{new}'"):
        create_method(name, **{old: 1})


def test_what_was_renamed():
    assert {(name, old) for name, old in RENAMED if old != "renew"} == {
        ("bees", "num"),
        ("beta_dpo", "filter_ratio"),
        ("dsir", "target_file"),
        ("infobatch", "period"),
        ("infobatch", "prune_ratio"),
        ("jest", "reference"),
        ("jest", "reference_column"),
        ("rho1", "reference"),
        ("rho1", "select_ratio"),
        ("selective_dpo", "refreshes"),
        ("zip", "rejected"),
    }
    assert {name for name, old in RENAMED if old == "renew"} == {
        "audit",
        "cosine_relevance",
        "d4",
        "data_shapley",
        "deita",
        "dsir",
        "edge",
        "gotd",
        "ifd",
        "jsd_relevance",
        "knn_shapley",
        "perplexity",
        "semdedup",
        "zip",
    }


@pytest.mark.parametrize("name", METHODS)
def test_keep_is_a_share(name):
    fields = {f.name: f for f in dataclasses.fields(get_method(name))}
    if "keep" not in fields:
        return
    assert "in (0, 1]" in fields["keep"].metadata["help"]
    for wrong in (0, 1.5, -0.1, True, "0.5"):
        with pytest.raises(ValueError, match=f"keep={wrong!r}"):
            create_method(name, keep=wrong, **REQUIRED.get(name, {}))


@pytest.mark.parametrize("name", METHODS)
def test_refresh_is_never_epoch_or_steps(name):
    if "refresh" not in {f.name for f in dataclasses.fields(get_method(name))}:
        return
    for wrong in (0, -2, 1.5, True, "step", "steps", "always"):
        with pytest.raises(ValueError, match=f"refresh={wrong!r}"):
            create_method(name, refresh=wrong, **REQUIRED.get(name, {}))


@pytest.mark.parametrize("name", METHODS)
def test_the_words_of_the_parameters(name):
    cls = get_method(name)
    names = [f.name for f in dataclasses.fields(cls)]
    for strange in ("renew", "period", "ratio_", "_ratio", "num", "prox", "select_", "prune_", "filter_"):
        found = [word for word in names if strange in word]
        assert set(found) <= {"gamma_ratio", "num_stages"}, (name, found)
    # The reference is DPO's: only a method that changes it has a parameter of that name.
    assert [word for word in names if "reference" in word] == (["refresh_reference"] if name == "curry_dpo" else [])
    assert "proxy" not in inspect.getdoc(cls).lower()


# ---- What is read ----

# Parameters that decide which others are read, and what they may be beside the actions of a method.
SWITCHES = {
    "adapt_inf": {"budget": [None, 5], "features": ["zero_order", "gradients"]},
    "audit": {"sources": [["texts"], ["statistics"], ["statistics", "trees"], ["statistics", "helper"]]},
    "data_shapley": {"target": [None, "demo", PAIRS], "values": [None, "values.parquet"]},
    "greats": {"target": ["demo", PAIRS]},
    "inrun_shapley": {"target": ["demo", PAIRS], "taylor": [1, 2]},
    "less": {"target": ["demo", PAIRS]},
    "alignment_potential": {"self_play": [0, 4], "all_scores_column": [None, "scores"], "reward": [None, REWARD]},
    "bees": {"sources": [["explicit"], ["implicit"], ["helper", "column:x"]], "fusion": ["product", "max"]},
    "curriculum": {"by": ["loss", "column"], "column": [None, "x"], "unbiased": [False, True]},
    "curry_dpo": {"responses_column": [None, "responses"], "reward": [None, REWARD]},
    "d4": {"embedding": ["policy", "column:x"]},
    "dataset_decomposition": {"mode": ["bucket", "decompose"]},
    "deita": {"complexity_model": [None, "a"], "quality_model": [None, "b"], "embedding": ["policy", "column:x"]},
    "dsir": {"target": [None, "target.txt"], "target_column": [None, "x"]},
    "edge": {"unfold": ["policy", "dataset"]},
    "filtered_dpo": {"temperature": [1.0, 0.0]},
    "gamma_po": {"form": ["simpo", "dpo"]},
    "gotd": {"target": ["demo", PAIRS], "embedding": ["policy", "column:x"], "domain_column": [None, "x"]},
    "ifd": {
        "form": ["superfiltering", "cherry"],
        "warm_up": [0, 5],
        "diverse": [None, 0.05],
        "model": [None, "a"],
        "embedding": ["policy", "column:x"],
    },
    "inco_dpo": {"prefix_tokens": [None, 3], "samples": [0, 2], "continuations": [0, 2]},
    "jest": {
        "loss_column": [None, "x"],
        "clean_column": [None, "x"],
        "model": [None, "a"],
        "diversity": [0.0, 1.0],
        "embedding": ["policy", "column:x"],
    },
    "seal": {"target": ["demo", PAIRS], "value": ["none", "helper"]},
    "cosine_relevance": {"target": ["demo", PAIRS], "embedding": ["policy", "column:x"]},
    "jsd_relevance": {"target": ["demo", PAIRS]},
    "knn_shapley": {"target": ["demo", PAIRS], "embedding": ["policy", "column:x"]},
    "margin": {"source": ["implicit", "explicit", "disagreement"], "reward": [None, REWARD]},
    "perplexity": {"model": [None, "a"]},
    "quad": {
        "target": ["demo", PAIRS],
        "embedding": ["policy", "column:x"],
        "precondition": ["kfac", "none"],
    },
    "rho1": {"clean_column": [None, "x"], "model": [None, "a"]},
    "rho_loss": {"source": ["cross_fit", "holdout", "column"]},
    "robust_dpo": {"mode": ["posterior", "rdpo", "cdpo"]},
    "s2l": {"trajectory_column": [None, "x"]},
    "select_k_of_b": {
        "by": ["loss", "implicit_margin", "explicit_margin", "length"],
        "mode": ["top_k", "bottom_k", "gumbel_top_k", "epsilon_mix"],
        "reward": [None, REWARD],
    },
    "selective_dpo": {"source": ["cross_fit", "online", "column", "table"], "table": [None, "difficulty.csv"]},
    "semdedup": {"eps": [None, 0.1], "embedding": ["policy", "column:x"]},
    "reward_augmented": {
        "reward": [None, REWARD],
        "implicit": [False, True],
        "attributes": [None, {"a": ["x", "y"]}],
    },
    "uni_dpo": {"reward": [None, REWARD]},
    "zip": {"form": ["offline", "online"]},
}
# Another value than the default, where one more, twice as much or another word would be refused for itself.
OTHER = {
    "solver": "factored",
    "action": "curriculum",
    "band": "high",
    "contradicted": "keep",
    "unfinished": "keep",
    "complexity_template": "{instruction}?",
    "embedding": "column:other",
    "flip_above": 0.7,
    "precondition": "adam",
    "full_at": 0.5,
    "keep": 0.05,
    "helper_model": "model",
    "helpers": 6,
    "high": 0.9,
    "holdout": 0.3,
    "model": "model",
    "normalize_margins": "none",
    "criterion_by": "learned_step",
    "pacing": "root",
    "pacing_over": "run",
    "quality_template": "{instruction} {output}?",
    "ratio": 0.3,
    "scale": "plain",
    "refresh": 3,
    "reward": REWARD,
    "start": 0.2,
    "epsilon": 0.2,
    "top_p": 0.5,
    "unchosen": "restore",
    "warm_up_high": 90.0,
    "warmup": 0.2,
}


def other_value(name, field):
    """A value of a parameter that is not its default, and would do where it is read."""
    if (name, field.name) == ("dsir", "refresh"):
        return "never"
    if field.name == "pooling":
        return "mean" if field.default == "last" else "last"
    if field.name == "refresh":
        return {"never": "epoch", "epoch": 3, None: 3}[field.default]
    if field.name in OTHER:
        return OTHER[field.name]
    if isinstance(field.default, bool):
        return not field.default
    if isinstance(field.default, int):
        return field.default + 1
    if isinstance(field.default, float):
        return field.default / 2 + 0.1
    return 0.5 if "float" in str(field.type) else 5 if "int" in str(field.type) else "other"


def guises(name):
    """The method under each combination of its switches that it takes, with what it cannot be made without."""
    cls, switches = get_method(name), dict(SWITCHES.get(name, {}))
    if "pacing" in {f.name for f in dataclasses.fields(cls)}:
        switches["pacing"] = [cls.pacing, "none"]
    if hasattr(cls, "actions"):
        switches["action"] = list(cls.actions)
    needed = {key: value for key, value in REQUIRED.get(name, {}).items() if key not in switches}
    found = []
    for values in itertools.product(*switches.values()):
        parameters = {**needed, **dict(zip(switches, values, strict=True))}
        try:
            found.append((parameters, create_method(name, **parameters)))
        except ValueError:
            continue
    return found


@pytest.fixture(autouse=True)
def _target(monkeypatch):
    """The file that `dsir` takes for its target is there."""
    monkeypatch.setattr("pathlib.Path.is_file", lambda self: True)


@pytest.mark.parametrize("name", METHODS)
def test_what_is_not_read_is_refused(name):
    cls = get_method(name)
    fields, reads = {f.name: f for f in dataclasses.fields(cls)}, reads_of(cls)
    refused, taken = set(), set()
    for parameters, method in guises(name):
        for key, conditions in reads.items():
            if all(condition.holds(method) for condition in conditions):
                taken.add(key)
            elif key not in parameters:
                value = other_value(name, fields[key])
                assert value != fields[key].default
                with pytest.raises(ValueError, match=re.escape(f"{key}={value!r}") + ".* read with|.* is not read by"):
                    create_method(name, **{**parameters, key: value})
                with pytest.raises(ValueError, match=re.escape(f"{key}={value!r}")):
                    cls(**{**parameters, key: value})
                refused.add(key)
    # Every condition is seen to fail and to hold, but for what no action of the method, or each of them, asks for.
    actions = set(getattr(cls, "actions", ()))
    asked = {
        key: [set(c.values or actions) & actions if c.parameters == ("action",) else None for c in conditions]
        for key, conditions in reads.items()
    }
    switches = {*SWITCHES.get(name, {}), "action", "pacing"}
    assert refused >= {key for key, found in asked.items() if any(values != actions for values in found)} - switches
    nowhere = {key for key, found in asked.items() if set() in found}
    nowhere |= {key for key, conditions in reads.items() if any(not c.parameters for c in conditions)}
    assert taken == set(reads) - nowhere


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("semdedup", {"low": 0.1}, "low=0.1 is read with action='band' only, but the actions of 'semdedup' are"),
        ("margin", {"low": 0.1}, "low=0.1 is not read with action='keep_top', but with action='band'"),
        ("perplexity", {"action": "weight", "keep": 0.3}, "keep=0.3 is not read with action='weight'"),
        ("alignment_potential", {"temperature": 2.0}, "temperature=2.0 is not read with action='keep_top'"),
        (
            "alignment_potential",
            {"evolve": 0.25},
            "evolve=0.25 is not read with self_play=0, but with self_play",
        ),
        ("zip", {"form": "online", "k1": 5}, "k1=5 is not read with form='online', but with form='offline'"),
        ("zip", {"form": "online", "action": "curriculum"}, "action='curriculum' is not read with form='online'"),
        ("zip", {"factor": 8}, "factor=8 is not read with form='offline'"),
        ("bees", {"sources": ["explicit"], "helper_lora": False}, "helper_lora=False is not read with sources="),
        ("margin", {"action": "weight", "refresh": 2}, "refresh=2 is not read with action='weight'"),
        ("curriculum", {"refresh": "never"}, "refresh='never': action='curriculum' orders each epoch anew"),
        ("d4", {"keep": 0.3}, "keep=0.3 is not read by 'd4': it keeps dedup"),
        ("selective_dpo", {"refresh": 5}, "refresh=5 is not read with source='cross_fit', but with source='online'"),
    ],
)
def test_the_error_says_with_what_it_is_read(name, parameters, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        create_method(name, **parameters)
    with pytest.raises(ValueError, match=re.escape(message)):
        get_method(name)(**parameters)


def test_conditions_of_unknown_parameters_are_refused():
    @dataclasses.dataclass
    class Mistaken(Method):
        """A method with a slip in its declaration."""

        size: int = 1
        reads: ClassVar = {"size": (when("mode", "a"),)}

    with pytest.raises(ValueError, match=r"Mistaken.reads names 'mode'"):
        register("mistaken")(Mistaken)
    assert "mistaken" not in list_methods()


@pytest.mark.parametrize("name", METHODS)
def test_each_parameter_is_looked_at(name):
    """A parameter that only the checks of the constructor look at does nothing."""
    cls = get_method(name)
    used = set()
    for base in cls.__mro__[:-1]:
        if not base.__module__.startswith("dsel_trl.") or base is Method:
            continue
        tree = ast.parse(inspect.getsource(sys.modules[base.__module__]))
        body = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == base.__name__)
        for node in body.body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith(("__post_init__", "_check", "check_")):
                used |= {part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)}
                if any(isinstance(part, ast.Name) and part.id == "helper_settings" for part in ast.walk(node)):
                    used |= set(helper_model.SETTINGS)
    elsewhere = {
        # Read as `getattr(self, f"{kind}_model")`, or handed on in the constructor.
        "deita": set(),
        "inco_dpo": {f.name for f in dataclasses.fields(Synthesis)} | {"generation_batch_size", "refresh"},
        "robust_dpo": {"eps"},
    }.get(name, set())
    assert {f.name for f in dataclasses.fields(cls)} - used - elsewhere <= {"normalize", "weighting"}


# ---- Whole numbers ----

WHOLE = [
    (name, f.name) for name in METHODS for f in dataclasses.fields(get_method(name)) if f.type in (int, int | None)
]


@pytest.mark.parametrize(("name", "key"), WHOLE)
@pytest.mark.parametrize("value", [2.5, True, "2", -1, float("nan")])
def test_whole_numbers_are_checked(name, key, value):
    if value == getattr(get_method(name), key, None):
        value = -(2**40)  # From the last: a block of a model.
    message = re.escape(f"{key}={value!r} is not a ") + "(whole number in|positive number of)"
    with pytest.raises(ValueError, match=message):
        create_method(name, **{**REQUIRED.get(name, {}), key: value})


def test_the_whole_numbers_are_all_of_them():
    assert {("zip", "k1"), ("semdedup", "clusters"), ("curry_dpo", "stages"), ("s2l", "seed")} <= set(WHOLE)
    assert {("dataset_decomposition", "cycles"), ("token_budget", "window")} <= set(WHOLE)
    assert len(WHOLE) > 40
    for name in METHODS:
        for f in dataclasses.fields(get_method(name)):
            assert ("int" not in str(f.type)) or (name, f.name) in WHOLE or f.name == "refresh", (name, f.name)


@pytest.mark.parametrize("value", [2.0, True, None, "3", 0, 8])
def test_outside_the_whole_numbers(value):
    with pytest.raises(ValueError, match=re.escape(f"k={value!r} is not a whole number in [1, 7].")):
        check_whole("k", value, 1, 7)


@pytest.mark.parametrize("value", [1, 7])
def test_inside_the_whole_numbers(value):
    check_whole("k", value, 1, 7)
