"""The floors of the house: imports only point down, and the package keeps its hands off what is not its own."""

import ast
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "dsel_trl"
FILES = sorted(PACKAGE.rglob("*.py"))

# From the ground up. A module may import from its own floor and from those below.
FLOORS = (
    {"functional"},
    {"tap", "unpaired", "gate", "ghost", "ledger", "sidecar", "sampler", "batching", "data", "cache"},
    {"run", "passes", "method", "composition", "selection"},
    {"methods"},
    {"trainer", "callback", "steps", "checks", "metrics", "report", "proxy", "generation"},
    {"cli", "__main__", "ablation", "arguments", "launch", "comparison", "building", "survey_table"},
)
FORBIDDEN_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "tools"}


@cache
def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def module_of(path):
    """Dotted name inside the package, such as `methods.margin`."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def top_level_nodes(node):
    """Nodes that run on import: bodies of functions and of `if TYPE_CHECKING` are left out."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        yield child
        yield from top_level_nodes(child)


def imports(path, everywhere):
    """Names of the package's modules that a file imports, dotted and without the package's own name."""
    nodes = ast.walk(tree(path)) if everywhere else top_level_nodes(tree(path))
    here = ["dsel_trl", *path.relative_to(PACKAGE).with_suffix("").parts]
    package = here[:-1]
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            names = [f"{prefix}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {name.removeprefix("dsel_trl.") for name in names if name.startswith("dsel_trl.")}
    return found


def floor_of(module):
    room = module.split(".")[0]
    return next((level for level, rooms in enumerate(FLOORS) if room in rooms), None)


@pytest.mark.parametrize("path", FILES, ids=lambda path: module_of(path) or "__init__")
def test_imports_point_down(path):
    module = module_of(path)
    if not module:
        return
    here = floor_of(module)
    if here is None:
        # A module between the rooms of the design: it may not reach up to the trainers, nor be reached by formulas.
        here = floor_of("methods")
    above = {name for name in imports(path, everywhere=False) if (floor_of(name) or 0) > here}
    assert not above


def test_the_check_of_floors_sees_an_import():
    assert "methods.margin" not in imports(PACKAGE / "trainer.py", everywhere=True)
    assert "functional.dpo_losses.pair_losses" in imports(PACKAGE / "tap.py", everywhere=False)
    assert "trainer" in {name.split(".")[0] for name in imports(PACKAGE / "callback.py", everywhere=False)}
    assert floor_of("methods.margin") < floor_of("trainer") < floor_of("cli")


@pytest.mark.parametrize("path", sorted((PACKAGE / "functional").glob("*.py")), ids=lambda path: path.stem)
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


@pytest.mark.parametrize("path", sorted((PACKAGE / "methods").glob("*.py")), ids=lambda path: path.stem)
def test_methods_do_not_know_the_trainer(path):
    rooms = {name.split(".")[0] for name in imports(path, everywhere=True)}
    assert not rooms & {"trainer", "callback", "steps", "cli"}


@pytest.mark.parametrize("name", ["trainer", "steps", "tap", "gate", "ledger", "sampler"])
def test_the_spine_knows_no_method(name):
    rooms = {module.split(".")[0] for module in imports(PACKAGE / f"{name}.py", everywhere=True)}
    assert "methods" not in rooms


def test_only_the_registry_loads_the_methods():
    loading = {module_of(path) for path in FILES if any(n.startswith("methods") for n in imports(path, True))}
    assert {module for module in loading if not module.startswith("methods")} <= {"method"}


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
    command_line = floor_of(module_of(path)) == len(FLOORS) - 1
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
