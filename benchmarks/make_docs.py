"""Writes ``docs/environments.md`` from the docstrings of the environments and wrappers.

Run ``python -m hiedit_benchmarks.make_docs`` after a docstring was changed; a test compares the
two.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from pathlib import Path

from hiedit_env import wrappers
from hiedit_env.envs.layer_selection import LayerSelection
from hiedit_env.envs.lifelong_edit import LifelongEdit
from hiedit_env.envs.observations import Observer
from hiedit_env.envs.planted import Planted
from hiedit_env.envs.step_size import StepSize
from hiedit_env.envs.vector import VectorEditing
from hiedit_env.testing.toy import ToyEditing

PAGE = Path(__file__).parents[1] / "docs" / "environments.md"

_HEAD = """# The environments

*Written from the docstrings by `python -m hiedit_benchmarks.make_docs`; they are the
specification.*
"""
_ENVIRONMENTS: Sequence[tuple[str, type]] = (
    ("`hiedit/LifelongEdit-v1`", LifelongEdit),
    ("`hiedit/LayerSelection-v1`", LayerSelection),
    ("`hiedit/StepSize-v1`", StepSize),
    ("Vector environments", VectorEditing),
    ("`hiedit/Planted-v1`", Planted),
    ("`hiedit/Toy-v1`", ToyEditing),
    ("The observation", Observer),
)


def page() -> str:
    """The whole page as Markdown."""
    parts = [_HEAD]
    parts += [f"## {title}\n\n{_markdown(kind)}" for title, kind in _ENVIRONMENTS]
    parts.append("## Wrappers")
    for name in sorted(wrappers.__all__):
        parts.append(f"### `{name}`\n\n{_markdown(getattr(wrappers, name))}")
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def _markdown(kind: type) -> str:
    """A docstring as Markdown: headings one level down, roles as code, examples fenced."""
    text = re.sub(r"^##", "###", inspect.cleandoc(kind.__doc__ or ""), flags=re.M)
    text = re.sub(r":[a-z]+:`[~.]*([^`]+)`", lambda match: f"`{match[1].split('.')[-1]}`", text)
    text = text.replace("``", "`")
    # Google's sections become bold words, so that their indented lines read as a list.
    text = re.sub(r"^(Args|Raises|Attributes):\n", _section, text, flags=re.M)
    text = re.sub(r"^    (\w[^\n:]*): ", r"- `\1`: ", text, flags=re.M)
    # Tables of the docstrings are reStructuredText's: shown as they are.
    text = re.sub(r"^(={3,} ={3,})\n(.*?)\n\1$", r"```text\n\2\n```", text, flags=re.M | re.S)
    return re.sub(r"^(>>> .*?)(?=\n\n|\Z)", r"```pycon\n\1\n```", text, flags=re.M | re.S)


def _section(match: re.Match[str]) -> str:
    names = {"Args": "Arguments", "Raises": "Errors", "Attributes": "Attributes"}
    return f"**{names[match[1]]}**\n\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
