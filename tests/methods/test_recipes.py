"""Every recipe is a run that the program accepts: known keys and methods, parameters in range, no conflict."""

from pathlib import Path

import pytest

from dsel_trl import create_method, get_method, list_methods
from dsel_trl.arguments import check_arguments, parse_arguments
from dsel_trl.composition import Composition

FILES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
# Recipes that are named after no method.
OTHERS = {"quickstart", "composed"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_recipe_is_accepted(path, tmp_path):
    kind = "sft" if "`dsel sft" in path.read_text().splitlines()[0] else "dpo"
    arguments = parse_arguments(kind, ["--config", str(path), "--output_dir", str(tmp_path)])
    check_arguments(arguments)
    methods = [create_method(**entry) for entry in arguments.selection]
    Composition(methods)
    assert all(kind in method.trainers for method in methods)
    if path.stem in list_methods():
        assert [method.name for method in methods] == [path.stem]


def test_each_preference_method_has_a_recipe():
    preference = {name for name in list_methods() if get_method(name).trainers == ("dpo",)}
    assert len(preference) >= 16
    assert preference <= {path.stem for path in FILES} - OTHERS
