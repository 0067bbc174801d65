"""`dsel recipe`: the recipes that travel with the package."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

import dsel_trl

from ..core.cards import aligned
from ..core.parameters import nearest
from . import COMMANDS


def print_recipe(words: Sequence[str]) -> str:
    """
    Runs `dsel recipe NAME` or `dsel recipe --list`.

    Args:
        words (`Sequence[str]`):
            The words after `dsel recipe`.

    Returns:
        `str`: the recipe, ready to be written to a file, or the list.

    Raises:
        `ValueError`: for an unknown word or recipe.
    """
    parser = argparse.ArgumentParser(prog="dsel recipe", description=COMMANDS["recipe"], allow_abbrev=False)
    parser.add_argument("name", nargs="?", help="such as margin, ablations/noise or accelerate/fsdp2")
    parser.add_argument("--list", action="store_true", help="list the recipes, with what each of them is for")
    asked, unknown = parser.parse_known_args(list(words))
    if unknown:
        raise ValueError(f"Unexpected word {unknown[0]!r}. See `dsel recipe --help`.")
    recipes = find_recipes()
    if asked.list and asked.name:
        raise ValueError(f"--list is of all recipes: leave out {asked.name!r}.")
    if asked.list or not asked.name:
        return aligned([(name, _first_sentence(path)) for name, path in recipes.items()])
    name = asked.name.removesuffix(".yaml").removeprefix("recipes/")
    if name not in recipes:
        raise ValueError(f"There is no recipe {asked.name!r}.{nearest(name, recipes)} See `dsel recipe --list`.")
    return recipes[name].read_text(encoding="utf-8").rstrip("\n")


def recipes_folder() -> Path:
    """Where the recipes are: in the package, or beside it where it runs out of its repository."""
    package = Path(dsel_trl.__file__).parent
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def find_recipes() -> dict[str, Path]:
    """The recipes by name: those of methods and others first, then those in folders."""
    folder = recipes_folder()
    files = sorted(folder.rglob("*.yaml"), key=lambda path: (len(path.relative_to(folder).parts), str(path)))
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in files}


def _first_sentence(path: Path) -> str:
    """The beginning of the comment at the top of a recipe, without the command that runs it."""
    words = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# `dsel"):
            words.append(line.lstrip("# "))
    return re.split(r"\. |: [`a]", " ".join(words))[0].removesuffix(".")
