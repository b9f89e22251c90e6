"""README.md and docs/: Python blocks run, links resolve, the front pages say the same.

Every block fenced as ``python`` is run by itself, from an empty folder, with warnings as errors. A
block that is not meant to run, such as a fragment that needs a GPU, is skipped by a line directly
above its fence that says why:

    <!-- not run: REASON -->

The reason is shown in the list of skipped tests, and a marker without one fails. In the same place

    <!-- needs: MODULE -->

skips a block where a module of an optional library is not installed.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>[^`]*)$")
NEEDS = re.compile(r"^ *<!-- needs: *(?P<module>[\w.]+) *-->$")
LINK = re.compile(r"\]\((?P<path>[^)\s#:]*)(?:#(?P<anchor>[^)\s]*))?\)")
MARKER = re.compile(r"^ *<!-- not run: *(?P<reason>.*?) *-->$")


class Block(NamedTuple):
    """A fenced block: page and first line, language, text, why it is not run, what it needs."""

    place: str
    language: str
    text: str
    skipped: str | None
    needs: str | None = None


def blocks(text: str, page: str) -> list[Block]:
    """All fenced blocks of a page."""
    found, lines, i = [], text.split("\n"), 0
    while i < len(lines):
        opening = FENCE.match(lines[i])
        if not opening:
            i += 1
            continue
        marker = MARKER.match(lines[i - 1]) if i else None
        needs = NEEDS.match(lines[i - 1]) if i else None
        indent = len(opening["indent"])
        end = next(j for j in range(i + 1, len(lines)) if lines[j].strip() == "```")
        # As many lines before the code as in the page, so that a traceback names the right one.
        code = "\n" * (i + 1) + "\n".join(line[indent:] for line in lines[i + 1 : end])
        reason = marker["reason"] if marker else None
        module = needs["module"] if needs else None
        found.append(Block(f"{page}:{i + 2}", opening["language"].strip(), code, reason, module))
        i = end + 1
    return found


ALL = [block for page in PAGES for block in blocks(page.read_text(), str(page.relative_to(ROOT)))]
PYTHON = [block for block in ALL if block.language == "python"]


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.place)
def test_a_block_runs(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if block.skipped is not None:
        assert block.skipped, f"{block.place}: the marker has to say why the block is not run"
        pytest.skip(block.skipped)
    if block.needs is not None:
        pytest.importorskip(block.needs)
    monkeypatch.chdir(tmp_path)
    code = compile(block.text, block.place.rpartition(":")[0], "exec")
    exec(code, {"__name__": "__main__"})


def test_the_pages_hold_blocks_and_no_other_spelling_hides_one() -> None:
    pages = {block.place.rpartition(":")[0] for block in PYTHON}
    assert pages >= {"README.md", "docs/testing.md"}
    # "pycon" blocks are doctests of docstrings, run where they stand; "text" is a table.
    assert {block.language for block in ALL} <= {"python", "bash", "json", "pycon", "text", ""}


def test_blocks_are_found_by_hand() -> None:
    page = (
        "a\n```python\nx = 1\n```\n<!-- not run: needs a GPU -->\n  ```python\n  y\n    z\n  ```\n"
    )
    one, two = blocks(page, "p.md")
    assert one == Block("p.md:3", "python", "\n\nx = 1", None)
    assert two == Block("p.md:7", "python", "\n" * 6 + "y\n  z", "needs a GPU")


def test_a_block_that_needs_a_missing_library_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (block,) = blocks("<!-- needs: no_such_module -->\n```python\n1 / 0\n```", "p.md")
    assert block.needs == "no_such_module"
    with pytest.raises(pytest.skip.Exception, match="no_such_module"):
        test_a_block_runs(block, tmp_path, monkeypatch)


def test_a_marker_without_a_reason_and_a_broken_block_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (bare,) = blocks("<!-- not run: -->\n```python\n```", "p.md")
    with pytest.raises(AssertionError, match="has to say why"):
        test_a_block_runs(bare, tmp_path, monkeypatch)
    (broken,) = blocks("\n\n```python\n1 / 0\n```", "p.md")
    with pytest.raises(ZeroDivisionError) as caught:
        test_a_block_runs(broken, tmp_path, monkeypatch)
    assert caught.traceback[-1].lineno == 3  # counted from 0: the page's fourth line


def prose(text: str) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^ *```.*?^ *```$", "", text, flags=re.M | re.S)


def anchors(text: str) -> set[str]:
    """What links to headings of a page are called, on the repository's page and in the site."""
    titles = re.findall(r"^#+ (.*)$", prose(text), flags=re.M)
    plain = (re.sub(r"\[([^]]*)\]\([^)]*\)|[`*]", r"\1", title).lower() for title in titles)
    return {re.sub(r"[^\w\- ]", "", title).strip().replace(" ", "-") for title in plain}


def page_text(path: Path) -> str:
    """Text of a page; of a notebook, that of its Markdown cells."""
    if path.suffix != ".ipynb":
        return path.read_text(encoding="utf-8")
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")


def broken_links(page: Path, text: str) -> list[str]:
    """Links of a page to files of the repository, or to headings, that do not exist."""
    broken = []
    for match in LINK.finditer(prose(text)):
        target = (page.parent / match["path"]).resolve() if match["path"] else page
        if not target.exists() or (
            match["anchor"] and match["anchor"] not in anchors(page_text(target))
        ):
            broken.append(match[0])
    return broken


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "docs" / "tutorial.ipynb"], ids=lambda page: str(page.relative_to(ROOT))
)
def test_links_within_the_repository_resolve(page: Path) -> None:
    assert broken_links(page, page_text(page)) == []


def test_broken_links_are_found_by_hand(tmp_path: Path) -> None:
    page = tmp_path / "a.md"
    (tmp_path / "b.md").write_text("# One `two`: [three](x)!\n```\n# no heading\n```\n")
    text = (
        "[1](b.md) [2](b.md#one-two-three) [3](c.md) [4](b.md#no-heading) [5](#own) [6](#other)\n"
        "[7](https://host/x)\n# Own\n```\n[8](in-code.md)\n```\n"
    )
    page.write_text(text)
    assert broken_links(page, text) == ["](c.md)", "](b.md#no-heading)", "](#other)"]


def test_the_readme_is_short_and_the_front_page_of_the_site_has_its_tables() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 150
    rows = [line for line in readme.splitlines() if line.startswith("|")]
    shown = rows[: rows.index(next(row for row in rows if row.startswith("| id ")))]
    assert len(shown) >= 14
    assert [row for row in shown if row not in index] == []
