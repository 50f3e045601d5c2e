"""Imports and includes go one way: a file uses only what stands before it on the way of a model through the code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "dynprune"
LAYERS = ("version", "errors", "timing", "control", "graph", "gates", "runtime", "training", "pruning", "cli", "integrations")
"""Of the package, first what stands first."""
ORDER_WITHIN = {
    "control": ("frontier", "controller", "monitor"),
    "graph": ("capture", "sites"),
    "gates": ("heads", "attach"),
    "runtime": ("plan", "lower", "engine", "model"),
    "cli": ("table", "models", "demo"),
}
FLOORS = ("vec", "kernels", "isa", "plan", "bindings")
"""Of csrc; base, kernels.h and dispatch.h serve several."""

MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in sorted(PACKAGE.rglob("*.py"))}
SOURCES = {
    str(path.relative_to(ROOT / "csrc")): path for path in sorted((ROOT / "csrc").rglob("*")) if path.suffix in (".h", ".cpp", ".inc")
}


def imports(module: str, *, when_loaded: bool = False) -> Iterator[str]:
    """Yields the modules of this package that a module imports; `when_loaded` leaves out those in functions and for types only."""
    for node in walk(ast.parse(MODULES[module].read_text()), when_loaded):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "dynprune")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}, line {node.lineno}: imports by full path, not relatively"
            if node.module.split(".")[0] == "dynprune":
                children = [f"{node.module}.{alias.name}" for alias in node.names]
                yield from (child if child in MODULES else node.module for child in children)


def walk(node: ast.AST, when_loaded: bool) -> Iterator[ast.AST]:
    yield node
    for child in ast.iter_child_nodes(node):
        late = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
        types_only = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
        if not (when_loaded and (late or types_only)):
            yield from walk(child, when_loaded)


def layer(module: str) -> str:
    return module.split(".")[1]


@pytest.mark.parametrize("module", [name for name in MODULES if name != "dynprune"])
def test_module_imports_only_earlier_layers(module):
    for imported in imports(module):
        if imported == "dynprune":
            continue
        assert LAYERS.index(layer(imported)) <= LAYERS.index(layer(module)), f"{module} imports {imported}, which stands after it"


@pytest.mark.parametrize("module", [name for name in MODULES if name != "dynprune"])
def test_root_is_imported_for_the_version_only(module):
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "dynprune":
            names = [alias.name for alias in node.names]
            assert names == ["__version__"], f"{module}, line {node.lineno}: import {names} by full path"


def test_no_module_imports_itself_through_others():
    modules = [name for name in MODULES if name != "dynprune"]
    graph = {module: set(imports(module, when_loaded=True)) - {module, "dynprune"} for module in modules}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"modules import each other: {' -> '.join(reversed(error.args[1]))}")


@pytest.mark.parametrize("folder", ORDER_WITHIN)
def test_modules_of_a_folder_keep_their_order(folder):
    order = [f"dynprune.{folder}.{name}" for name in ORDER_WITHIN[folder]]
    for position, module in enumerate(order):
        later = set(order[position + 1 :]) & set(imports(module))
        assert not later, f"{module} imports {sorted(later)}, which stand after it"


def test_every_layer_is_known():
    unknown = {layer(module) for module in MODULES if module != "dynprune"} - set(LAYERS)
    assert not unknown, f"add {sorted(unknown)} to LAYERS, where it stands on the way of a model"


def includes(source: str) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^">]+)[">]', SOURCES[source].read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("source", SOURCES)
def test_source_includes_only_its_floor_and_those_below(source):
    folder = source.split("/")[0]
    for included in includes(source):
        assert not included.startswith(("torch/", "ATen/", "c10/")), f"{source} includes {included}: csrc knows no torch"
        if folder != "bindings":
            assert not included.startswith(("pybind11/", "Python.h")), f"{source} includes {included}: only bindings/ knows Python"
        floor = included.split("/")[0]
        if folder in FLOORS and floor in FLOORS:
            assert FLOORS.index(floor) <= FLOORS.index(folder), f"{source} includes {included}, a floor above it"
        if folder in ("plan", "bindings"):
            assert floor not in ("vec", "kernels", "isa"), f"{source} includes {included}: kernels are reached through the KernelTable"
