"""What this package uses of other libraries' insides is in one table, and the installed releases have it."""

import ast
import inspect
from dataclasses import replace
from pathlib import Path

import pytest
import trl

import dsel_trl.trainer
from dsel_trl import SelectionCallback
from dsel_trl.trainer import internals
from dsel_trl.trainer.internals import INTERNALS, Internal, check_internals, find_problem, missing_parameters
from dsel_trl.trainer.kinds import KINDS, trainer_kind

ROOM = Path(dsel_trl.trainer.__file__).parent
FILES = [*sorted(ROOM.glob("*.py")), ROOM.parent / "callback.py"]
TABLE = {internal.name for internal in INTERNALS}
# What the libraries document of a trainer, and what the mixin adds.
DOCUMENTED = {
    "accelerator",
    "add_callback",
    "args",
    "data_collator",
    "eval_dataset",
    "model",
    "model_wrapped",
    "optimizer",
    "processing_class",
    "remove_callback",
    "selection",
    "state",
    "train",
    "train_dataset",
}
LIBRARIES = {"trl", "transformers", "accelerate", "peft"}


def tree(source):
    return ast.parse(source)


def own_names(nodes):
    """Private names that a file's own classes and functions define."""
    names = set()
    for node in ast.walk(nodes):
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            names.add(node.attr)
    return names


def private(name):
    return name.startswith("_") and not name.startswith("__")


def used(source):
    """Names of others' insides that a source uses: private ones, undocumented ones of a trainer, of hidden modules."""
    nodes = tree(source)
    own = own_names(nodes)
    names = set()
    for node in ast.walk(nodes):
        if isinstance(node, ast.Attribute):
            holder = ast.unparse(node.value)
            # A seam is defined here too: what it stands before is another's all the same.
            hidden = holder == "super()" or (private(node.attr) and node.attr not in own)
            if hidden or (holder in ("trainer", "self.trainer") and not node.attr.startswith("__")):
                names.add(node.attr)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr"):
            target, name = node.args[0], node.args[1]
            if ast.unparse(target) in ("trainer", "self.trainer") and isinstance(name, ast.Constant):
                names.add(name.value)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            library, *rest = node.module.split(".")
            if library in LIBRARIES and rest:
                names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {
                alias.name for alias in node.names if alias.name.split(".")[0] in LIBRARIES and "." in alias.name
            }
    return names - DOCUMENTED


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_name_that_is_used_is_in_the_table(path):
    assert used(path.read_text(encoding="utf-8")) <= TABLE | {"train", "__init__"}


def test_no_name_of_the_table_is_unused():
    found = set().union(*(used(path.read_text(encoding="utf-8")) for path in FILES)) | {"train"}
    # Read as attributes of the mixin's own `self`, which other trainers' names pass through as well.
    seen = " ".join(path.read_text(encoding="utf-8") for path in FILES if path.stem != "internals")
    assert {name for name in TABLE - found if f".{name}" not in seen} == set()


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("trainer._inner_step()", "_inner_step"),
        ("def f(trainer):\n    return trainer.accelerator._models", "_models"),
        ("self.trainer.hidden", "hidden"),
        ("getattr(trainer, 'hidden', None)", "hidden"),
        ("from trl.trainer.utils import pad", "pad"),
        ("import transformers.trainer_utils", "transformers.trainer_utils"),
        ("class A:\n    def _step(self):\n        return super()._step()", "_step"),
    ],
)
def test_the_reader_sees_what_is_used(source, name):
    assert name in used(source)


def test_the_reader_passes_over_what_is_ours_or_documented():
    source = "class A:\n    def f(self):\n        self._own = self.trainer.model\n        return self._own"
    assert not used(source)


@pytest.mark.parametrize("kind", KINDS)
def test_the_installed_releases_have_all_of_it(make_trainer, reward_trainer, kind):
    trainer = reward_trainer() if kind == "reward" else make_trainer(kind)
    check_internals(trainer, trainer_kind(trainer))


def test_what_is_set_while_training_is_set(make_trainer):
    trainer = make_trainer("dpo", max_steps=1)
    names = [internal.name for internal in INTERNALS if internal.owner == "running"]
    assert names
    assert not any(hasattr(trainer, name) for name in names)
    trainer.train()
    assert all(hasattr(trainer, name) for name in names)


def test_seams_take_what_the_class_beneath_takes():
    """An argument that TRL calls a seam with must find its place in the mixin's own signature."""
    from dsel_trl.trainer.mixin import SelectionMixin

    for internal in INTERNALS:
        seam = SelectionMixin.__dict__.get(internal.name)
        if internal.owner == "class" and seam is not None:
            assert not missing_parameters(seam, internal.parameters or ()), internal.name


@pytest.mark.parametrize("name", ["_precompute_ref_logps", "_prepare_dataset", "compute_loss"])
def test_a_trl_that_lacks_a_method_is_refused_by_its_name(make_trainer, monkeypatch, name):
    trainer = make_trainer("dpo")
    for cls in type(trainer).__mro__:
        if name in cls.__dict__:
            monkeypatch.delattr(cls, name)
    state = dict(trainer.__dict__)
    with pytest.raises(ImportError, match=rf"`{name}` of `DPOTrainer`.*Found .*trl {trl.__version__}"):
        SelectionCallback(trainer, "random")
    assert type(trainer) is trl.DPOTrainer
    assert trainer.__dict__ == state


def test_a_trl_that_lacks_an_attribute_is_refused_by_its_name(make_trainer):
    trainer = make_trainer("dpo")
    del trainer.f_divergence_type
    with pytest.raises(ImportError, match="`f_divergence_type` of `DPOTrainer`"):
        SelectionCallback(trainer, "random")


def test_a_trl_that_lacks_a_function_is_refused_by_its_name(make_trainer, monkeypatch):
    monkeypatch.delattr("trl.trainer.utils.use_adapter")
    with pytest.raises(ImportError, match=r"`use_adapter` of `trl.trainer.utils`"):
        SelectionCallback(make_trainer("sft"), "random")


def test_a_trl_that_renamed_a_parameter_is_refused_by_its_name(make_trainer, monkeypatch):
    monkeypatch.setattr(
        trl.SFTTrainer, "_prepare_dataset", lambda self, dataset, processing_class, args, dataset_name: dataset
    )
    with pytest.raises(ImportError, match=r"takes no \['packing', 'formatting_func'\]"):
        SelectionCallback(make_trainer("sft"), "random")


def test_a_head_that_may_be_missing_is_not_asked_for(make_trainer, monkeypatch):
    trainer = make_trainer("dpo")
    (head,) = [internal for internal in INTERNALS if internal.optional]
    gone = replace(head, name="no_such_head")
    assert find_problem(gone, trainer, trl.DPOTrainer) is None
    assert "no_such_head" in find_problem(replace(gone, optional=False), trainer, trl.DPOTrainer)
    assert "no.such.module" in find_problem(Internal("x", "no.such.module"), trainer, trl.DPOTrainer)
    assert find_problem(replace(head, parameters=("model", "no_such_parameter")), trainer, trl.DPOTrainer) or (
        internals.importlib.import_module(head.owner).__dict__.get(head.name) is None
    )


def test_the_check_of_parameters_reads_signatures():
    assert missing_parameters(inspect.unwrap, ("func", "stop")) == []
    assert missing_parameters(inspect.unwrap, ("func", "go")) == ["go"]
