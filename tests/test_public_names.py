"""The names that ``hiedit_env`` and ``hiedit_agents`` export: late, and complete.

``check_exported_types.py`` is their counterpart for type checkers.
"""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import hiedit_agents
import hiedit_env

PACKAGES = [hiedit_env, hiedit_agents]
EXPORTS = [
    (package, name, module)
    for package in PACKAGES
    for module, names in package._EXPORTS.items()
    for name in names
]


@pytest.mark.parametrize(
    ("package", "name", "module"), EXPORTS, ids=[f"{p.__name__}.{name}" for p, name, _ in EXPORTS]
)
def test_every_name_is_what_its_module_holds(package: ModuleType, name: str, module: str) -> None:
    value = getattr(package, name)
    assert value is getattr(importlib.import_module(module), name)
    # Where it is defined, not a module that imports it in turn.
    assert value.__module__ == module


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_the_three_lists_of_names_agree(package: ModuleType) -> None:
    names = sorted(name for other, name, _ in EXPORTS if other is package)
    assert sorted(package.__all__) == names
    assert set(names) <= set(dir(package))
    # What type checkers read.
    tree = ast.parse(Path(str(package.__file__)).read_text(encoding="utf-8"))
    (block,) = (
        node
        for node in tree.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    seen = {
        node.module: tuple(alias.name for alias in node.names)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
    }
    assert seen == package._EXPORTS


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_an_unknown_name_is_an_attribute_error(package: ModuleType) -> None:
    with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no .* 'NoSuchName'"):
        _ = package.NoSuchName


def test_importing_the_packages_imports_no_torch() -> None:
    code = (
        "import sys, hiedit_env, hiedit_agents\n"
        "dir(hiedit_env), dir(hiedit_agents)\n"
        # Names that need no torch do not bring it.
        "hiedit_env.load_requests('tiny-facts'), hiedit_env.Request, hiedit_env.ActionError\n"
        "print(sorted({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))\n"
        "hiedit_env.LowRankUpdate\n"
        "print('torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\nTrue\n"
