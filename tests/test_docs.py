"""The Python blocks of README.md and docs/*.md run as they stand.

Every block fenced as ``python`` is run by itself, from an empty folder, with warnings as errors. A
block that is not meant to run, such as a fragment that needs a GPU, is skipped by a line directly
above its fence that says why:

    <!-- not run: REASON -->

The reason is shown in the list of skipped tests, and a marker without one fails. In the same place

    <!-- needs: MODULE -->

skips a block where a module of an optional library is not installed.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>[^`]*)$")
NEEDS = re.compile(r"^ *<!-- needs: *(?P<module>[\w.]+) *-->$")
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
