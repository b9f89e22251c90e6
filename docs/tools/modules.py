"""Writes the table of modules in ``docs/architecture.md`` from the modules' first lines.

Run ``python docs/tools/modules.py`` after a module was added, moved or described anew;
``make docs`` does so too, and a test compares the two.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "architecture.md"
FOLDERS = ("hiedit_env", "agents", "benchmarks")
#: The table stands between these two lines of the page.
BEGIN, END = "<!-- modules: begin -->", "<!-- modules: end -->"


def first_line(text: str) -> str:
    """First line of a module's docstring as a Markdown table cell; ``""`` where there is none."""
    line = (ast.get_docstring(ast.parse(text)) or "").split("\n", 1)[0]
    line = re.sub(r":[a-z]+:`~?([^`]+)`", lambda match: f"`{match[1].split('.')[-1]}`", line)
    return line.replace("``", "`").replace("|", "\\|").removesuffix(".")


def rows(folder: Path) -> Iterator[tuple[str, str]]:
    """Path from the root and first line: of a package, its modules, then its sub-packages."""
    modules = sorted(folder.glob("*.py"), key=lambda path: (path.name != "__init__.py", path.name))
    for path in modules:
        place = path.relative_to(ROOT).as_posix()
        text = first_line(path.read_text(encoding="utf-8"))
        yield (place, text) if path.name != "__init__.py" else (place[: -len(path.name)], text)
    for below in sorted(folder.iterdir()):
        if (below / "__init__.py").exists():
            yield from rows(below)


def table() -> str:
    """The whole table, packages in bold."""
    lines = ["| module | what it holds |", "|---|---|"]
    for name in FOLDERS:
        for place, text in rows(ROOT / name):
            bold = "**" if place.endswith("/") else ""
            lines.append(f"| {bold}[{place}](../{place}){bold} | {text} |")
    return "\n".join(lines)


def page(text: str) -> str:
    """The page with its table made anew.

    Raises:
        ValueError: the page has not exactly one pair of markers.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"docs/architecture.md needs one line {BEGIN} and one line {END}")
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    old = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(page(old), encoding="utf-8")
