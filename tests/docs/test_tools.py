"""What ``make docs`` adds to mkdocs: pages, links, docstrings, the check of the built site."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

griffe = pytest.importorskip("griffe")
pytest.importorskip("mkdocs")

ROOT = Path(__file__).parents[2]


def tool(name: str) -> ModuleType:
    """A module of docs/tools, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


site, check, docstrings = tool("site"), tool("check"), tool("docstrings")


# -- links between pages ----------------------------------------------------------------------


def test_links_to_files_become_links_to_their_pages() -> None:
    text = (
        "[a](../agents/rl/ppo.py) [b](agents.md#training) [c](../README.md) [d](tutorial.ipynb)\n"
        "[e](../hiedit_env/wrappers/__init__.py) [f](https://host/x.py) [g](#here)\n"
        "```\n[h](../agents/rl/ppo.py)\n```\n"
    )
    assert site.relink(text, "docs/x.md", "x.md") == (
        "[a](reference/hiedit_agents/rl/ppo.md) [b](agents.md#training) [c](index.md)"
        " [d](tutorial.md)\n"
        "[e](reference/hiedit_env/wrappers/index.md) [f](https://host/x.py) [g](#here)\n"
        "```\n[h](../agents/rl/ppo.py)\n```\n"
    )
    deep = site.relink("[a](../../hiedit_env/errors.py)", "docs/decisions/x.md", "decisions/x.md")
    assert deep == "[a](../reference/hiedit_env/errors.md)"


def test_a_link_to_a_file_that_the_site_does_not_show_is_refused() -> None:
    with pytest.raises(site.PluginError, match=r"docs/x\.md links to Makefile"):
        site.relink("[a](../Makefile)", "docs/x.md", "x.md")


def test_every_module_has_one_page_in_the_navigation() -> None:
    def pages(entries: list[object]) -> list[str]:
        found = []
        for entry in entries:
            value = next(iter(entry.values())) if isinstance(entry, dict) else entry
            found += pages(value) if isinstance(value, list) else [value]
        return found

    listed = pages(site.reference_nav())
    modules = [
        file for package in site.PACKAGES.values() for file in (ROOT / package).rglob("*.py")
    ]
    assert len(listed) == len(set(listed)) == len(modules)
    assert "reference/hiedit_env/index.md" in listed
    assert "reference/hiedit_agents/rl/ppo.md" in listed


def test_the_page_of_a_package_lists_its_modules() -> None:
    file = ROOT / "hiedit_env" / "rules" / "__init__.py"
    text = site.reference_page("hiedit_env.rules", file)
    assert "::: hiedit_env.rules\n" in text
    assert "| [base](base.md) | Update rules: what to write" in text


def test_a_notebook_becomes_a_page(tmp_path: Path) -> None:
    code = {"cell_type": "code", "source": ["1 + 1"], "execution_count": 1}
    printed = {"output_type": "stream", "text": ["2\n"]}
    cells = [{"cell_type": "markdown", "source": ["# T\n", "text"]}, {**code, "outputs": [printed]}]
    path = tmp_path / "n.ipynb"
    path.write_text(json.dumps({"cells": cells}))
    assert site.notebook_page(path) == ("# T\ntext\n\n```python\n1 + 1\n```\n\n```text\n2\n```\n")
    path.write_text(json.dumps({"cells": [{**code, "execution_count": None, "outputs": []}]}))
    with pytest.raises(site.PluginError, match="was not run"):
        site.notebook_page(path)
    error = {"output_type": "error", "evalue": "division by zero"}
    path.write_text(json.dumps({"cells": [{**code, "outputs": [error]}]}))
    with pytest.raises(site.PluginError, match="division by zero"):
        site.notebook_page(path)


# -- docstrings -------------------------------------------------------------------------------

SOURCE = '''
"""A module, see :class:`Child`."""
from other import Thing

LIMIT = 1

class Parent:
    """One."""
    def method(self):
        """Two."""

class Child(Parent):
    """See :meth:`method`, :meth:`Parent.method`, :data:`LIMIT`, :class:`~pkg.m.Parent`,
    :func:`gone`."""
'''


@pytest.fixture
def package(tmp_path: Path) -> object:
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "__init__.py").write_text("")
    (tmp_path / "pkg" / "m.py").write_text(SOURCE)
    extensions = griffe.load_extensions(docstrings.Docstrings)
    return griffe.load("pkg", search_paths=[tmp_path], extensions=extensions)


def test_roles_become_links(package: object, caplog: pytest.LogCaptureFixture) -> None:
    def link(path: str, shown: str) -> str:
        return f'<autoref identifier="{path}" optional><code>{shown}</code></autoref>'

    assert package["m"].docstring.value == f"A module, see {link('pkg.m.Child', 'Child')}."
    assert package["m.Child"].docstring.value == (
        f"See {link('pkg.m.Parent.method', 'method')},"
        f" {link('pkg.m.Parent.method', 'Parent.method')}, {link('pkg.m.LIMIT', 'LIMIT')},"
        f" {link('pkg.m.Parent', 'Parent')},\n<code>gone</code>."
    )


def test_a_role_that_names_nothing_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "pkg2").mkdir()
    text = '"""See :func:`gone`, :func:`gone.too`, :mod:`pkg2` and :func:`json.dumps`."""'
    (tmp_path / "pkg2" / "__init__.py").write_text(text)
    griffe.load(
        "pkg2",
        search_paths=[tmp_path],
        extensions=griffe.load_extensions(docstrings.Docstrings),
    )
    messages = [r.message for r in caplog.records if "does not exist" in r.message]
    assert messages == [
        "pkg2 names 'gone', which does not exist",
        "pkg2 names 'gone.too', which does not exist",
    ]


def test_examples_tables_and_shared_parameters(package: object) -> None:
    text = (
        "First.\n\n>>> 1\n1\n\n>>> 2\n2\n\nLast.\n\n=== ===\na   b\n=== ===\nc   d\n=== ===\n\n"
        "Args:\n    x, y: Two\n        lines.\n    z: One.\n\nRaises:\n    A, B: both.\n"
    )
    assert docstrings.markdown(text, package["m"], set()) == (
        "First.\n\n```pycon\n>>> 1\n1\n\n>>> 2\n2\n```\n\nLast.\n\n"
        "```text\n=== ===\na   b\n=== ===\nc   d\n=== ===\n```\n\n"
        "Args:\n    x: Two\n        lines.\n    y: Two\n        lines.\n    z: One.\n\n"
        "Raises:\n    A, B: both.\n"
    )


# -- the built site ---------------------------------------------------------------------------


def test_the_check_finds_broken_links_and_other_hosts(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.png").write_bytes(b"")
    (tmp_path / "sub" / "index.html").write_text('<h1 id="top">x</h1>')
    good = (
        '<a href="sub/">1</a><a href="sub/index.html#top">2</a><a href="#own" id="own">3</a>'
        '<a href="https://host/page">4</a><a href="mailto:a@b">5</a><img src="b.png">'
        '<a href="#__toc">6</a>'
    )
    (tmp_path / "a.html").write_text(good)
    (tmp_path / "s.css").write_text("a { background: url(b.png) }")
    assert list(check.problems(tmp_path)) == []
    (tmp_path / "c.html").write_text(
        '<a href="gone.html">1</a><a href="sub/#gone">2</a><a href="#gone">3</a>'
        '<script src="https://host/x.js"></script><link rel="stylesheet" href="//host/x.css">'
        '<img src="gone.png"><p style="background: url(https://host/i.png)">'
    )
    (tmp_path / "s.css").write_text('@import "https://host/fonts.css";')
    assert sorted(check.problems(tmp_path)) == [
        "c.html links to #gone, and there is no such place on the page",
        "c.html links to gone.html, and there is no such file",
        "c.html links to gone.png, and there is no such file",
        "c.html links to sub/#gone, and there is no such place on the page",
        "c.html loads //host/x.css",
        "c.html loads https://host/i.png",
        "c.html loads https://host/x.js",
        "s.css loads https://host/fonts.css",
    ]


# -- the tutorial -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_the_tutorial_runs_and_prints_what_it_shows() -> None:
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("nbclient")
    pytest.importorskip("matplotlib")
    notebook = tool("notebook")
    stored = notebook.texts(nbformat.read(notebook.PATH, as_version=4))
    assert "restored exactly: True\n" in "".join(stored)
    assert notebook.texts(notebook.run()) == stored, "python docs/tools/notebook.py --write"
