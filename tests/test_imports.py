"""The arrows between packages and between sub-packages: one direction, no cycle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "hiedit_env": ROOT / "hiedit_env",
    "hiedit_agents": ROOT / "agents",
    "hiedit_benchmarks": ROOT / "benchmarks",
}
#: What each package may import of the others.
ALLOWED = {
    "hiedit_env": set(),
    "hiedit_agents": {"hiedit_env"},
    "hiedit_benchmarks": {"hiedit_env", "hiedit_agents"},
}


def modules() -> dict[str, Path]:
    """Module name → file, for every module of the three packages."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imported(tree: ast.AST, known: set[str]) -> Iterator[str]:
    """Modules of the project that a module imports, wherever the import stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            base = node.module or ""
            names = [
                full if (full := f"{base}.{alias.name}") in known else base for alias in node.names
            ]
        else:
            continue
        yield from (name for name in names if name in known)


def arrows() -> dict[str, set[str]]:
    """Module → modules of the project that it imports."""
    known = modules()
    return {
        name: set(imported(ast.parse(path.read_text(encoding="utf-8")), set(known)))
        for name, path in known.items()
    }


def room(module: str) -> str:
    """The sub-package of a module, or the module itself at the top of a package."""
    return ".".join(module.split(".")[:2])


def graph_of_rooms(found: dict[str, set[str]]) -> dict[str, set[str]]:
    """Sub-package → sub-packages that its modules import; packages themselves do not count."""
    graph: dict[str, set[str]] = {}
    for name, targets in found.items():
        if "." in name:
            rooms = {room(target) for target in targets if "." in target}
            graph.setdefault(room(name), set()).update(rooms - {room(name)})
    return graph


def check_no_cycle(graph: dict[str, set[str]]) -> None:
    tuple(TopologicalSorter(graph).static_order())


def test_packages_import_in_one_direction() -> None:
    wrong = [
        f"{name} imports {target}"
        for name, targets in arrows().items()
        for target in targets
        if (top := target.split(".")[0]) != (own := name.split(".")[0]) and top not in ALLOWED[own]
    ]
    assert not wrong


def test_neither_sub_packages_nor_modules_import_in_a_circle() -> None:
    found = arrows()
    check_no_cycle(graph_of_rooms(found))
    check_no_cycle(found)


def test_a_circle_is_noticed() -> None:
    with pytest.raises(CycleError):
        check_no_cycle(graph_of_rooms({"a.x.m": {"a.y.n"}, "a.y.n": {"a.x.k"}, "a.x.k": set()}))


def test_every_import_of_the_project_is_of_a_module_that_exists() -> None:
    known = set(modules())
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in FOLDERS:
                assert node.module in known, f"{name} imports {node.module}"


def test_top_of_the_environment_package_stays_small() -> None:
    entries = {path.name for path in FOLDERS["hiedit_env"].iterdir()} - {"__pycache__"}
    assert len(entries) <= 12, sorted(entries)
