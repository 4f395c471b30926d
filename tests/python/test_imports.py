"""Modules of the package import one way: no module imports one that imports it.

Imports inside functions count, because they only hide a circle; those for type checkers do not.
"""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "python" / "ipex_llm"
MODULES = {
    ".".join(("ipex_llm", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(
        ".__init__"
    ): path
    for path in PACKAGE.rglob("*.py")
}


def imports_of(name: str, path: Path) -> set[str]:
    """The modules of the package that `path`, the module `name`, imports."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join((*parents, base) if base else parents)
            for alias in node.names:
                module = f"{base}.{alias.name}"
                found.add(module if module in MODULES else base)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return {module for module in found if module in MODULES}


def room(module: str) -> str:
    """`module`, or ipex_llm.fuse for all of it: its mixins call back what has put them there."""
    return "ipex_llm.fuse" if module.startswith("ipex_llm.fuse.") else module


def test_no_module_imports_one_that_imports_it():
    graph: dict[str, set[str]] = {}
    for name, path in MODULES.items():
        imported = {room(module) for module in imports_of(name, path)}
        graph.setdefault(room(name), set()).update(imported - {room(name)})
    assert len(graph["ipex_llm.optimize"]) > 5
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail("modules import each other: " + " <- ".join(error.args[1]))
