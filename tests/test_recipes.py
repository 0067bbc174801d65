"""Every recipe trains: the program takes it as it is, on small data and for two steps."""

import re
from pathlib import Path

import pytest
import yaml

from dsel_trl import get_method, list_methods
from dsel_trl.cli import DONE, main
from dsel_trl.data.demo.corpus import demo_completions, demo_judged, demo_preferences
from dsel_trl.data.demo.model import build_demo_model

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "recipes").glob("*.yaml"))
# Recipes that are named after no method.
OTHERS = {"quickstart", "composed", "kto", "stages"}
ROWS = 48
# So many that every stage of the demo corpus has some.
HELD_OUT = 32


def kind_of(path):
    return re.search(r"`dsel (\w+) ", path.read_text().split("\n\n")[0])[1]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A demo model that was trained for a moment, and small files of both demo corpora."""
    folder = tmp_path_factory.mktemp("demo")
    build_demo_model(folder / "model", steps=2)
    for kind, build in (("dpo", demo_preferences), ("sft", demo_completions), ("kto", demo_judged)):
        for split, rows in build(train_size=ROWS, test_size=HELD_OUT).items():
            (folder / kind).mkdir(exist_ok=True)
            rows.to_parquet(str(folder / kind / f"{split}.parquet"))
    return folder


@pytest.mark.usefixtures("pictures")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_recipe_trains(path, demo, tmp_path, capsys):
    kind = kind_of(path)
    words = [kind, "--config", str(path), "--dataset_name", str(demo / kind), "--output_dir", str(tmp_path / "run")]
    words += ["--model_name_or_path", str(demo / "model"), "--max_steps", "2", "--warmup_steps", "0"]
    words += ["--per_device_train_batch_size", "4", "--use_cpu", "true", "--report_to", "none"]
    words += ["--save_strategy", "no"]
    assert main(words) == DONE, capsys.readouterr().err
    ledgers = list((tmp_path / "run").rglob("selection/ledger.parquet"))
    assert ledgers
    assert all(path.with_name("selection.png").stat().st_size for path in ledgers)


def test_the_recipe_of_wpo_weighs_as_the_paper_does():
    (block,) = yaml.safe_load((ROOT / "recipes" / "wpo.yaml").read_text())["selection"]
    method = get_method(block.pop("name"))(**block)
    assert (method.normalize, method.cap) == ("none", 1.0)


def test_each_method_has_a_recipe_of_its_name():
    names = {path.stem for path in FILES} - OTHERS
    assert names == set(list_methods())
    assert all(kind_of(path) in get_method(path.stem).trainers for path in FILES if path.stem in names)


def test_the_readme_says_what_each_method_trains_on():
    text = (ROOT / "recipes" / "README.md").read_text()
    rows = dict(re.findall(r"^\| \[`(\w+)`\]\(\1\.yaml\) \|[^|]*\| ([^|]*) \|", text, re.MULTILINE))
    assert rows == {name: ", ".join(get_method(name).trainers) for name in list_methods()}
