"""The floors of the house: imports only point down, and the package keeps its hands off what is not its own."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "dsel_trl"
FILES = sorted(PACKAGE.rglob("*.py"))
LONGEST = 400

# From the ground up: a module may import from the floors below its own and from its own room. Rooms that stand side by
# side on one floor know each other only where SIDE_BY_SIDE says so.
FLOORS = (
    {"functional"},
    {"data", "signals", "sampling"},
    {"core"},
    {"scorers", "trainer", "report"},
    {"callback", "bases"},
    {"methods", "commands"},
    {"cli"},
    {"__main__"},
)
SIDE_BY_SIDE = {("signals", "data"), ("sampling", "data")}
# What a room may not know although it stands above it.
APART = {"bases": {"trainer", "callback"}, "methods": {"trainer", "callback"}}
# The registry alone reaches up, when the methods are asked for.
UPWARD = {("core.registry", "methods")}
FORBIDDEN_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "tools"}
# Names of the trainers' world that are known in `trainer/` alone.
TRAINER_MODULES = re.compile(r"^(trl|transformers\.trainer|accelerate\.(utils|accelerator|data_loader))(\.|_|$)")
PUBLIC_TRL = {"commands.arguments", "commands.train", "commands.build"}
# Objects of the trainers' world by the names that they have here.
FOREIGN = {"trainer", "proxy", "helper", "accelerator", "args", "model", "reference", "policy", "module", "loader"}


@cache
def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def module_of(path):
    """Dotted name inside the package, such as `methods.text.zip`; the package itself is empty."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {module_of(path): path for path in FILES}


def room_of(module):
    return module.split(".")[0]


def floor_of(module):
    """Floor of a module; a room that the house does not have is a `KeyError`."""
    for level, rooms in enumerate(FLOORS):
        if room_of(module) in rooms:
            return level
    raise KeyError(f"{module}: the house has no room {room_of(module)!r}")


def imported_names(path):
    """Absolute dotted names of all that a file imports: at its top, inside functions and for type checkers alike."""
    package = ["dsel_trl", *path.relative_to(PACKAGE).with_suffix("").parts][:-1]
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            found |= {f"{prefix}.{alias.name}" for alias in node.names}
    return found


@cache
def imports(path):
    """Modules of the package that a file imports, each by its longest name that is a module."""
    found = set()
    for name in imported_names(path):
        if name.split(".")[0] != "dsel_trl":
            continue
        parts = name.split(".")[1:]
        while ".".join(parts) not in MODULES:
            parts.pop()
        found.add(".".join(parts))
    return found - {module_of(path), ""}


def may_import(module, other):
    """Whether an arrow from one module to another points down, or stays in its room."""
    here, there = room_of(module), room_of(other)
    if there in APART.get(here, ()):
        return False
    if here == there or (module, there) in UPWARD or (here, there) in SIDE_BY_SIDE:
        return True
    return floor_of(other) < floor_of(module)


def circle(graph):
    """Some modules that import each other in a ring, or nothing."""
    done, path = set(), []

    def walk(module):
        if module in path:
            return path[path.index(module) :]
        if module in done:
            return None
        path.append(module)
        for other in sorted(graph.get(module, ())):
            found = walk(other)
            if found:
                return found
        path.pop()
        done.add(module)
        return None

    return next((found for module in sorted(graph) if (found := walk(module))), None)


def private_attributes(path):
    """Private attributes of objects of the trainers' world, such as `trainer._tokenizer`."""
    found = set()
    for node in ast.walk(tree(path)):
        if not isinstance(node, ast.Attribute) or not node.attr.startswith("_") or node.attr.startswith("__"):
            continue
        owner = dotted(node.value).split(".")[-1]
        if owner in FOREIGN:
            found.add(f"{owner}.{node.attr}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: module_of(path) or "__init__")
def test_every_module_has_a_room_and_imports_point_down(path):
    module = module_of(path)
    if not module:
        return
    floor_of(module)
    assert not {other for other in imports(path) if not may_import(module, other)}


def test_no_two_modules_need_each_other():
    # The registry loads the methods when they are asked for, long after both are there.
    graph = {
        module: {other for other in imports(path) if (module, room_of(other)) not in UPWARD}
        for module, path in MODULES.items()
    }
    assert circle(graph) is None


def test_the_checks_see_what_they_are_for(tmp_path):
    assert "functional.dpo_losses" in imports(MODULES["signals.pair_batch"])
    assert {"trainer.mixin", "core.ledger"} <= imports(MODULES["callback"])
    assert "methods" in imports(MODULES["core.registry"])
    assert not may_import("methods.text.zip", "trainer.rows")
    assert not may_import("bases.scored", "trainer.rows")
    assert not may_import("scorers.rewards", "report.picture")
    assert not may_import("functional.ranking", "core.run")
    assert may_import("core.registry", "methods.text.zip")
    assert not may_import("core.run", "methods.text.zip")
    with pytest.raises(KeyError, match="no room 'attic'"):
        floor_of("attic.box")
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c"]
    assert circle({"a": {"b", "c"}, "b": {"c"}}) is None
    for name in ("trl", "trl.trainer.utils", "transformers.trainer", "transformers.trainer_pt_utils"):
        assert TRAINER_MODULES.match(name)
    assert not TRAINER_MODULES.match("transformers.AutoConfig")
    assert "trainer._train_batch_size" in private_attributes(MODULES["trainer.serving"])


@pytest.mark.parametrize("path", FILES, ids=lambda path: module_of(path) or "__init__")
def test_only_one_room_knows_the_trainers(path):
    module = module_of(path)
    if room_of(module) == "trainer":
        return
    known = {name for name in imported_names(path) if TRAINER_MODULES.match(name)}
    if module in PUBLIC_TRL:
        known = {name for name in known if not name.startswith("trl.") or name.count(".") > 1}
    assert not known
    assert not private_attributes(path)


@pytest.mark.parametrize("path", FILES, ids=lambda path: module_of(path) or "__init__")
def test_no_file_is_too_long_to_be_read(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST


def test_the_tests_stand_where_the_code_stands():
    tests = PACKAGE.parent / "tests"
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and (path / "__init__.py").is_file()}
    assert not {room for room in rooms if not list((tests / room).rglob("test_*.py"))}


@pytest.mark.parametrize("path", sorted((PACKAGE / "functional").rglob("*.py")), ids=lambda path: path.stem)
def test_formulas_need_numpy_and_torch_only(path):
    known = {"numpy", "torch", "functional", "dsel_trl"}
    for node in ast.walk(tree(path)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        for name in names:
            root = name.split(".")[0]
            assert root in known | STANDARD_LIBRARY | OPTIONAL, f"{path.name} imports {name}"


STANDARD_LIBRARY = set(__import__("sys").stdlib_module_names)
# Extras of the project, imported where they are used.
OPTIONAL = {"sklearn", "faiss", "ot", "scipy"}


def test_modules_say_what_they_are():
    assert not {path for path in FILES if path.stem in FORBIDDEN_NAMES or path.parent.name in FORBIDDEN_NAMES}
    assert not [path for path in FILES if not ast.get_docstring(tree(path))]


def dotted(node):
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def calls(path):
    """Dotted names of all calls, and whether each stands inside a `with` that keeps a generator's state."""

    def walk(node, guarded):
        for child in ast.iter_child_nodes(node):
            inside = guarded
            if isinstance(child, ast.With):
                names = [dotted(i.context_expr.func) for i in child.items if isinstance(i.context_expr, ast.Call)]
                inside = guarded or any(name.endswith(("fork_rng", "preserved_rng")) for name in names)
            if isinstance(child, ast.Call):
                yield dotted(child.func), inside, child
            yield from walk(child, inside)

    return list(walk(tree(path), False))


SEEDING = {"torch.manual_seed", "torch.seed", "np.random.seed", "numpy.random.seed", "random.seed", "set_seed"}
DRAWS = ("rand", "randn", "randint", "choice", "choices", "permutation", "sample", "shuffle", "random", "uniform")
GLOBAL_DRAWS = {f"{module}.{name}" for module in ("np.random", "random") for name in DRAWS}


@pytest.mark.parametrize("path", FILES, ids=lambda path: module_of(path) or "__init__")
def test_global_generators_are_left_alone(path):
    for name, guarded, _ in calls(path):
        assert name not in GLOBAL_DRAWS, name
        assert guarded or name not in SEEDING, f"{name} outside of a block that gives the state back"


@pytest.mark.parametrize("path", FILES, ids=lambda path: module_of(path) or "__init__")
def test_nothing_is_executed_or_printed_on_the_side(path):
    imported = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            imported.add(node.module.split(".")[0])
    assert not imported & {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
    command_line = room_of(module_of(path)) in ("cli", "commands")
    for name, _, call in calls(path):
        assert name not in ("eval", "exec", "pickle.load", "pickle.loads", "torch.save"), name
        if name == "torch.load":
            assert any(k.arg == "weights_only" and getattr(k.value, "value", None) is True for k in call.keywords)
        assert command_line or name != "print", "log instead"
        for keyword in call.keywords:
            value = getattr(keyword.value, "value", None)
            assert not (keyword.arg == "trust_remote_code" and value is True)
            assert not (keyword.arg == "allow_pickle" and value is True)


@pytest.mark.parametrize("path", FILES, ids=lambda path: module_of(path) or "__init__")
def test_no_class_of_others_is_patched(path):
    """Assignments to attributes of imported names, such as `Trainer.train = ...`."""
    names = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    for node in ast.walk(tree(path)):
        targets = node.targets if isinstance(node, ast.Assign) else []
        for target in targets:
            assert not (isinstance(target, ast.Attribute) and dotted(target).split(".")[0] in names), dotted(target)
