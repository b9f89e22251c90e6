"""Rules of the house that no other tool checks: the size of a file, one kind of command line."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    p for name in ("hiedit_env", "agents", "benchmarks") for p in (ROOT / name).rglob("*.py")
)
MOST_LINES = 400
#: What a module's docstring says that has a reason to be longer.
REASON = "longer than"


def too_long(text: str) -> bool:
    said = ast.get_docstring(ast.parse(text)) or ""
    return text.count("\n") > MOST_LINES and REASON not in said


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_long_without_a_reason(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not too_long(text), f"{text.count(chr(10))} lines; split it, or say why it is {REASON} …"


def test_a_long_file_is_noticed_and_a_reason_counts() -> None:
    assert not too_long("x = 1\n" * MOST_LINES)
    assert too_long("x = 1\n" * (MOST_LINES + 1))
    assert not too_long(
        '"""Longer. It is longer than others because."""\n' + "x = 1\n" * MOST_LINES
    )


def test_there_is_one_kind_of_command_line() -> None:
    for path in MODULES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {
            name
            for node in ast.walk(tree)
            for name in (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module]
                if isinstance(node, ast.ImportFrom)
                else []
            )
        }
        assert not names & {"argparse", "optparse", "getopt", "click", "typer"}, path
