"""`dsel recipe`: every recipe by its name, also where nothing but a wheel is installed."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from dsel_trl.cli import main
from dsel_trl.commands.recipe import find_recipes, print_recipe

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "recipes").rglob("*.yaml"))


def test_a_recipe_is_printed_as_it_is():
    assert f"{print_recipe(['margin'])}\n" == (ROOT / "recipes" / "margin.yaml").read_text(encoding="utf-8")
    assert print_recipe(["recipes/accelerate/fsdp2.yaml"]) == print_recipe(["accelerate/fsdp2"])


def test_the_list_names_all_of_them_and_what_they_are_for():
    lines = print_recipe(["--list"]).splitlines()
    names = [path.relative_to(ROOT / "recipes").with_suffix("").as_posix() for path in FILES]
    assert sorted(line.split()[0] for line in lines) == sorted(names) == sorted(find_recipes())
    assert all(len(line.split()) > 2 and len(line) < 180 for line in lines), max(lines, key=len)


@pytest.mark.parametrize(
    ("words", "said"), [(["margn"], "'margin'"), (["--lst"], "--lst"), (["margin", "--list"], "'margin'")]
)
def test_mistakes(capsys, words, said):
    assert main(["recipe", *words]) == 2
    assert said in capsys.readouterr().err


def test_recipes_travel_with_the_wheel(tmp_path):
    source, wheels, installed = tmp_path / "source", tmp_path / "wheels", tmp_path / "installed"
    source.mkdir()
    for name in ("dsel_trl", "recipes"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(wheels)]
    built = subprocess.run([*command, str(source)], capture_output=True, text=True)
    if "No module named" in built.stderr or "No module named" in built.stdout or "BackendUnavailable" in built.stderr:
        pytest.skip("pip or setuptools>=77 is not installed here")
    assert built.returncode == 0, built.stderr[-2000:]
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(installed)
    assert {f"dsel_trl/{path.relative_to(ROOT).as_posix()}" for path in FILES} <= names
    assert {"dsel_trl/report/page.css", "dsel_trl/report/page.js", "dsel_trl/py.typed"} <= names
    done = subprocess.run(
        [sys.executable, "-m", "dsel_trl", "recipe", "quickstart"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == (ROOT / "recipes" / "quickstart.yaml").read_text(encoding="utf-8")
