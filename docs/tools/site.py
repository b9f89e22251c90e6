"""Makes pages of the site that are not files of docs/, and links that fit both places.

* ``reference/…``: one page per module, which mkdocstrings fills from the docstrings; a package's
  page lists its modules by their first lines.
* ``tutorial.md``: the notebook ``docs/tutorial.ipynb`` with its stored outputs.
* ``CONTRIBUTING.md`` and ``CHANGELOG.md`` of the repository's root.

Pages link to files of the repository, such as ``../agents/rl/ppo.py``; in the site such a link goes
to the file's page of the reference.
"""

from __future__ import annotations

import ast
import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
#: Folder of every package, by the name under which it is installed.
PACKAGES = {
    "hiedit_env": "hiedit_env",
    "hiedit_agents": "agents",
    "hiedit_benchmarks": "benchmarks",
}
#: Files of the root that are pages of the site.
ROOT_PAGES = {
    name: name.lower() for name in ("CONTRIBUTING.md", "CHANGELOG.md") if (ROOT / name).exists()
}
LINK = re.compile(r"(?<=\]\()(?P<target>[^)\s:#]+)(?P<anchor>#[^)\s]*)?(?=\))")
FENCE = re.compile(r"^ *```.*?^ *```", re.M | re.S)


def modules() -> dict[str, Path]:
    """Dotted name and file of every module of the packages, in the order of the reference."""
    found = {}
    for package, folder in PACKAGES.items():
        for file in sorted((ROOT / folder).rglob("*.py")):
            if file.name == "__main__.py":
                continue
            parts = [package, *file.relative_to(ROOT / folder).with_suffix("").parts]
            found[".".join(part for part in parts if part != "__init__")] = file
    return dict(sorted(found.items()))


def page_of(name: str, file: Path) -> str:
    """The page of a module, as a path in the site's folder of sources."""
    path = "reference/" + name.replace(".", "/")
    return f"{path}/index.md" if file.name == "__init__.py" else f"{path}.md"


def site_target(path: str) -> str | None:
    """The page that stands for a file of the repository, None if the site has none.

    Args:
        path: Relative to the root of the repository, such as ``"agents/rl/ppo.py"``.
    """
    if path == "README.md":
        return "index.md"
    if path in ROOT_PAGES:
        return ROOT_PAGES[path]
    if path.endswith(".ipynb"):
        path = path.removesuffix(".ipynb") + ".md"
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    for name, file in modules().items():
        if file == ROOT / path or file == ROOT / path / "__init__.py":
            return page_of(name, file)
    return None


def relink(text: str, source: str, page: str) -> str:
    """Links of a page, rewritten from places in the repository to places in the site.

    Args:
        text: Markdown of the page.
        source: The page's path in the repository.
        page: The page's path in the site.

    Raises:
        PluginError: a link names a file of the repository that the site does not show.
    """

    def replaced(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), match["target"]))
        target = site_target(path)
        if target is None:
            raise PluginError(f"{source} links to {path}, which is no page of the site")
        return posixpath.relpath(target, posixpath.dirname(page)) + (match["anchor"] or "")

    parts, last = [], 0
    for fence in FENCE.finditer(text):
        parts += [LINK.sub(replaced, text[last : fence.start()]), fence[0]]
        last = fence.end()
    return "".join([*parts, LINK.sub(replaced, text[last:])])


def reference_page(name: str, file: Path) -> str:
    """Markdown of a module's page: its docstring and members, its modules if it is a package."""
    lines = [f"# {name.rsplit('.', 1)[-1]}", "", f"`{name}`", "", f"::: {name}"]
    if file.name == "__init__.py":
        # What a package exports is described where it is defined.
        lines += ["    options:", "      members: false", ""]
        inside = {n: f for n, f in modules().items() if n.rpartition(".")[0] == name}
        if inside:
            lines += ["| module | |", "|---|---|"]
        for module, path in inside.items():
            link = posixpath.relpath(page_of(module, path), posixpath.dirname(page_of(name, file)))
            lines.append(f"| [{module.rsplit('.', 1)[-1]}]({link}) | {_first_line(path)} |")
    return "\n".join(lines) + "\n"


def _first_line(file: Path) -> str:
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    line = text.split("\n\n")[0].replace("\n", " ").replace("|", "\\|")
    return re.sub(r":[a-z]+:`[~.]*([^`]+)`", r"`\1`", line).replace("``", "`")


def reference_nav() -> list[Any]:
    """Entries of the navigation for all reference pages, nested as the packages are."""
    tree: dict[str, list[Any]] = {}
    for name, file in modules().items():
        page, parent = page_of(name, file), name.rpartition(".")[0]
        children = tree.setdefault(parent, [])
        title = name.rsplit(".", 1)[-1]
        if file.name == "__init__.py":
            tree[name] = [page]
            children.append({title: tree[name]})
        else:
            children.append({title: page})
    return tree[""]


def notebook_page(path: Path) -> str:
    """A notebook as Markdown: its texts, its code and the outputs it was saved with.

    Raises:
        PluginError: a code cell was saved without having been run, or with an error.
    """
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    parts = []
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        if cell["execution_count"] is None:
            raise PluginError(f"{path} holds a cell that was not run: jupyter execute --inplace it")
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            if output["output_type"] == "error":
                raise PluginError(f"{path} holds an error: {output['evalue']}")
            data = output.get("data", {})
            if "image/png" in data:
                image = "".join(data["image/png"]).strip()
                parts.append(f"![output of the cell above](data:image/png;base64,{image})")
            else:
                text = "".join(output.get("text", data.get("text/plain", "")))
                parts.append(f"```text\n{text.rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Puts the pages of the reference into the navigation."""
    nav = [item for item in config.nav or [] if item != {"Reference": "reference/"}]
    nav.append({"Reference": reference_nav()})
    inside = next(item["Inside"] for item in nav if "Inside" in item)
    inside += [{name.removesuffix(".md").title(): page} for name, page in ROOT_PAGES.items()]
    config.nav = nav
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are made here."""
    made = {page_of(name, file): reference_page(name, file) for name, file in modules().items()}
    for path in sorted((ROOT / "docs").glob("*.ipynb")):
        made[path.stem + ".md"] = notebook_page(path)
    for name, page in ROOT_PAGES.items():
        made[page] = (ROOT / name).read_text(encoding="utf-8")
    for page, text in made.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrites the links of a page."""
    uri = page.file.src_uri
    if uri.startswith("reference/"):
        return markdown
    root = {made: name for name, made in ROOT_PAGES.items()}
    return relink(markdown, root.get(uri, f"docs/{uri}"), uri)
