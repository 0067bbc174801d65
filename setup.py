"""What `pyproject.toml` cannot say: the recipes lie beside the package in the repository, but inside it in a wheel."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

RECIPES = Path("recipes")


class BuildWithRecipes(build_py):
    """Copies `recipes/` into the built package; an editable installation reads them where they are."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for file in sorted([*RECIPES.rglob("*.yaml"), RECIPES / "README.md"]):
            target = Path(self.build_lib) / "dsel_trl" / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)


setup(cmdclass={"build_py": BuildWithRecipes})
