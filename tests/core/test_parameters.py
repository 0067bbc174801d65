"""One word for one thing: what parameters are called, which of them an action reads, and what numbers they take."""

import dataclasses
import inspect

import pytest

from dsel_trl import create_method, get_method, list_methods
from dsel_trl.core.registry import renamed_parameters

METHODS = list_methods()
# What a method cannot be made without.
REQUIRED = {
    "dsir": {"target_column": "domain"},
    "edge": {"guideline": "Answer briefly."},
    "filtered_dpo": {"reward": "tests.contract.cases:fewest_words"},
    "inco_dpo": {"reward": "tests.contract.cases:fewest_words"},
    "jest": {"loss_column": "loss"},
    "rho1": {"clean_column": "clean"},
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
        "d4",
        "deita",
        "dsir",
        "edge",
        "ifd",
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
