"""The table of modules in ``docs/architecture.md`` is that of the tree."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
tool = runpy.run_path(str(ROOT / "docs" / "tools" / "modules.py"))


def test_the_page_has_the_table_of_today() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert tool["page"](text) == text, "run: python docs/tools/modules.py"


def test_a_row_says_path_and_first_line() -> None:
    table = tool["table"]().splitlines()
    row = (
        "| [hiedit_env/files.py](../hiedit_env/files.py) "
        "| Files that appear complete or not at all |"
    )
    assert row in table
    assert sum("**[" in line for line in table) == len(list_of_packages())


def list_of_packages() -> list[Path]:
    folders = (ROOT / name for name in ("hiedit_env", "agents", "benchmarks"))
    return [path for folder in folders for path in folder.rglob("__init__.py")]


def test_a_first_line_by_hand() -> None:
    text = '"""One :class:`~a.b.Thing` | ``x``.\n\nMore.\n"""\n'
    assert tool["first_line"](text) == "One `Thing` \\| `x`"
    assert tool["first_line"]("x = 1\n") == ""


def test_a_page_without_a_place_for_the_table_is_refused() -> None:
    with pytest.raises(ValueError, match="one line <!-- modules: begin -->"):
        tool["page"]("# A page\n")
