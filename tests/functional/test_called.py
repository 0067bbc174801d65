"""Every formula is run by the package: a function that only its own tests and oracles call proves nothing."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "dsel_trl"
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


class Module:
    """The top level of a file: its definitions, where its imported names come from, and what runs on import."""

    def __init__(self, name, source, is_package, known):
        self.name = name
        self.defined, self.imported, self.loose = {}, {}, []
        package = name.split(".") if is_package else name.split(".")[:-1]
        body = ast.parse(source)
        for node in ast.walk(body):
            if isinstance(node, ast.ImportFrom):
                base = package[: len(package) - node.level + 1] if node.level else []
                origin = ".".join([*base, *([node.module] if node.module else [])])
                for alias in node.names:
                    self.imported[alias.asname or alias.name] = (origin, alias.name)
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name in known:
                        self.imported[alias.asname or alias.name] = (alias.name, None)
        for node in body.body:
            if isinstance(node, DEFINITIONS):
                self.defined[node.name] = node
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    for name in ast.walk(target):
                        if isinstance(name, ast.Name):
                            self.defined[name.id] = node
            elif not isinstance(node, ast.Import | ast.ImportFrom):
                self.loose.append(node)
        self.body = body


def bound_in(scope):
    """Names that are a function's own: its parameters and what is assigned in it."""
    names = set()
    if isinstance(scope, (*DEFINITIONS[:2], ast.Lambda)):
        a = scope.args
        names |= {x.arg for x in (*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg) if x is not None}
    waiting = list(ast.iter_child_nodes(scope))
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, DEFINITIONS):
            names.add(node.name)
        if not isinstance(node, (*DEFINITIONS, ast.Lambda)):
            waiting += ast.iter_child_nodes(node)
    return names


def mentions(node, own=frozenset()):
    """Dotted names that a piece of code reads, less those that stand for a variable of its own."""
    if isinstance(node, SCOPES):
        own = own | bound_in(node)
    if isinstance(node, ast.Attribute | ast.Name):
        parts = []
        inner = node
        while isinstance(inner, ast.Attribute):
            parts.append(inner.attr)
            inner = inner.value
        if isinstance(inner, ast.Name):
            if isinstance(inner.ctx, ast.Load) and inner.id not in own:
                yield ".".join([inner.id, *reversed(parts)])
            return
    for child in ast.iter_child_nodes(node):
        yield from mentions(child, own)


def read(sources):
    """Modules by dotted name, from `{path: source}`."""
    names = {}
    for path in sources:
        parts = Path(path).with_suffix("").parts
        names[path] = ".".join(part for part in parts if part != "__init__")
    known = set(names.values())
    return {
        names[path]: Module(names[path], source, path.endswith("__init__.py"), known)
        for path, source in sources.items()
    }


def resolve(modules, module, dotted):
    """`(module, name)` of what a dotted name stands for; the name is None for a module itself."""
    head, *rest = dotted.split(".")
    if head in module.imported:
        origin, name = module.imported[head]
    elif head in module.defined:
        return module.name, head
    else:
        return None
    seen = set()
    while (origin, name) not in seen:
        seen.add((origin, name))
        if name is not None and f"{origin}.{name}" in modules:
            origin, name = f"{origin}.{name}", None
        if origin not in modules:
            return None
        if name is None:
            if not rest:
                return origin, None
            name = rest.pop(0)
        elif name not in modules[origin].defined and name in modules[origin].imported:
            origin, name = modules[origin].imported[name]
        else:
            return origin, name
    return None


def uncalled(sources, room="dsel_trl.functional"):
    """Public functions and classes of `room`, and public methods of its classes, that nothing outside leads to."""
    modules = read(sources)

    def inside(name):
        return name == room or name.startswith(f"{room}.")

    waiting, attributes = [], set()

    def follow(module, node):
        attributes.update(n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute))
        for dotted in mentions(node):
            found = resolve(modules, module, dotted)
            if found and inside(found[0]):
                waiting.append(found)

    for name, module in modules.items():
        if not inside(name):
            follow(module, module.body)
    used = set()
    while waiting:
        name, item = waiting.pop()
        # Code that stands free in a module runs with whatever is used of it.
        for node in modules[name].loose if (name, None) not in used else ():
            follow(modules[name], node)
        used.add((name, None))
        if item is None or (name, item) in used:
            continue
        used.add((name, item))
        if item in modules[name].defined:
            follow(modules[name], modules[name].defined[item])
    dead = []
    for name, module in modules.items():
        if not inside(name):
            continue
        for item, node in module.defined.items():
            if not isinstance(node, DEFINITIONS) or item.startswith("_"):
                continue
            if (name, item) not in used:
                dead.append(f"{name}.{item}")
            elif isinstance(node, ast.ClassDef):
                methods = [n.name for n in node.body if isinstance(n, DEFINITIONS) and not n.name.startswith("_")]
                dead += [f"{name}.{item}.{method}" for method in methods if method not in attributes]
    return sorted(dead)


def test_every_formula_is_called():
    sources = {str(path.relative_to(PACKAGE.parent)): path.read_text("utf-8") for path in PACKAGE.rglob("*.py")}
    assert any(path.startswith("dsel_trl/functional/") for path in sources)
    assert uncalled(sources) == []


FORMULAS = """
def called(x):
    return inner(x)

def inner(x):
    return x

def island(x):
    return other_island(x)

def other_island(x):
    return island(x)

class Kept:
    def asked(self):
        return 1

    def unasked(self):
        return 2

TABLE = {"a": by_table}

def by_table(x):
    return x
"""


@pytest.mark.parametrize(
    ("method", "dead"),
    [
        ("from .functional.f import called, Kept, TABLE\nTABLE, called(1), Kept().asked()", set()),
        ("from .functional import f as g\ng.TABLE, g.called(1), g.Kept().asked()", set()),
        ("import dsel_trl.functional.f as g\ng.TABLE, g.called(1), g.Kept().asked()", set()),
        ("def late():\n    from .functional.f import called\n    called(1)", {"Kept", "by_table"}),
        ("from .functional.f import called", {"called", "inner", "Kept", "by_table"}),
        (
            "from .functional.f import called, inner\ndef run(called):\n    return called(inner)",
            {"called", "Kept", "by_table"},
        ),
    ],
)
def test_the_check_finds_what_is_not_called(method, dead):
    sources = {
        "dsel_trl/__init__.py": "",
        "dsel_trl/functional/__init__.py": "",
        "dsel_trl/functional/f.py": FORMULAS,
        "dsel_trl/m.py": method,
    }
    always = {"island", "other_island"} | ({"Kept.unasked"} if "Kept" not in dead else set())
    assert uncalled(sources) == sorted(f"dsel_trl.functional.f.{name}" for name in dead | always)
