"""Checks the built site: no link is broken, and no page loads anything from another host.

Runs at the end of ``make docs``; each finding is a warning, and so an error of the build.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from mkdocs.config.defaults import MkDocsConfig

_LOG = logging.getLogger("mkdocs.plugins.hiedit_check")
#: Attributes by which an element loads something as soon as the page is shown.
LOADS = {
    ("audio", "src"), ("embed", "src"), ("iframe", "src"), ("img", "src"), ("link", "href"),
    ("object", "data"), ("script", "src"), ("source", "src"), ("video", "src"),
}  # fmt: skip
CSS_LOAD = re.compile(r"""(?:url\(|@import\s+)["']?\s*((?:https?:)?//[^"')\s]+)""")


class _Page(HTMLParser):
    """Ids and links of one page."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[tuple[str, str]] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Remembers one element."""
        for name, value in attrs:
            if value is None:
                continue
            if name == "id" or (tag == "a" and name == "name"):
                self.ids.add(value)
            if (tag, name) in LOADS:
                self.loads.append(value)
            elif tag == "a" and name == "href":
                self.links.append((tag, value))
            elif name == "style":
                self.loads += CSS_LOAD.findall(value)


def problems(site: Path) -> Iterator[str]:
    """Every broken link and every thing loaded from another host, one sentence each."""
    pages: dict[Path, _Page] = {}
    for file in sorted(site.rglob("*.html")):
        pages[file.resolve()] = page = _Page()
        page.feed(file.read_text(encoding="utf-8"))
    for file in sorted(site.rglob("*.css")):
        for address in CSS_LOAD.findall(file.read_text(encoding="utf-8")):
            yield f"{file.relative_to(site)} loads {address}"
    for file, page in pages.items():
        where = file.relative_to(site.resolve())
        for address in page.loads:
            if urlsplit(address).netloc:
                yield f"{where} loads {address}"
        for address in [*page.loads, *(link for _, link in page.links)]:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc or address == "":
                continue
            # Only the page for wrong addresses names files from the root of the host.
            base = site if parts.path.startswith("/") else file.parent
            target = (base / unquote(parts.path).lstrip("/")).resolve() if parts.path else file
            if target.is_dir():
                target /= "index.html"
            if not target.exists():
                yield f"{where} links to {address}, and there is no such file"
            elif (
                parts.fragment
                and target in pages
                and not parts.fragment.startswith("__")
                and unquote(parts.fragment) not in pages[target].ids
            ):
                yield f"{where} links to {address}, and there is no such place on the page"


def on_post_build(config: MkDocsConfig) -> None:
    """Warns of every problem of the site that was built."""
    for problem in problems(Path(config.site_dir)):
        _LOG.warning(problem)
