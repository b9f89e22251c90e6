"""What is left of a stream of edits: a table in Markdown with intervals, and the picture."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hiedit_env.envs.plotting import bare_axes, line_style, new_figure, png

RESAMPLES = 2000

#: Title of a column, and the metrics of a check, plain and in chat.
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "facts": ("efficacy", "chat_efficacy"),
    "paraphrases": ("generalization", "chat_generalization"),
    "unrelated prompts": ("specificity", "chat_specificity"),
    "control prompts": ("controls",),
    "own texts": ("texts",),
}


#: Columns that are lines of the picture.
DRAWN = ("facts", "paraphrases", "unrelated prompts")


def interval(shares: Sequence[float | None], seed: int = 0) -> tuple[float, float, float] | None:
    """Mean in percent, with a 95 % bootstrap interval over facts or prompts; None without numbers.

    >>> interval([None, 1.0, 1.0])
    (100.0, 100.0, 100.0)
    """
    known: NDArray[np.float64] = np.array([100 * s for s in shares if s is not None])
    if not len(known):
        return None
    rng = np.random.default_rng(seed)
    means = known[rng.integers(len(known), size=(RESAMPLES, len(known)))].mean(1)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(known.mean()), float(low), float(high)


def report(checks: Sequence[Mapping[str, Any]]) -> str:
    """A row for every check: percent, plain / in chat, with intervals.

    Args:
        checks: The fields of :class:`.held_out.Check`.
    """
    lines = [
        f"| edits | {' | '.join(COLUMNS)} | seconds an edit |",
        f"|{'---|' * (len(COLUMNS) + 2)}",
    ]
    for check in checks:
        cells = [
            " / ".join(_shown(check["shares"].get(name, ())) for name in names)
            for names in COLUMNS.values()
        ]
        seconds = statistics.median(fact["seconds"] for fact in check["written"])
        lines.append(f"| {check['edits']} | {' | '.join(cells)} | {seconds:.1f} |")
    return "\n".join(lines) + "\n"


def draw(checks: Sequence[Mapping[str, Any]]) -> bytes:
    """The picture as PNG: :data:`DRAWN` over the stream, plain and, where there is one, in chat.

    Raises:
        MissingLibraryError: matplotlib is not installed.
    """
    titles = ["plain"]
    if any(interval(check["shares"].get("chat_efficacy", ())) for check in checks):
        titles.append("in chat")
    figure = new_figure(4.5 * len(titles), 4, dpi=110, layout="constrained")
    panels = figure.subplots(1, len(titles), sharey=True, squeeze=False)[0]
    edits = [check["edits"] for check in checks]
    for form, (title, axes) in enumerate(zip(titles, panels, strict=True)):
        for index, label in enumerate(DRAWN):
            name = COLUMNS[label][form]
            found = [interval(check["shares"].get(name, ())) for check in checks]
            known = [(n, one) for n, one in zip(edits, found, strict=True) if one is not None]
            if not known:
                continue
            rows = np.array([one for _, one in known])
            places, style = [n for n, _ in known], line_style(index)
            axes.plot(places, rows[:, 0], marker="o", markersize=4, label=label, **style)
            axes.fill_between(places, rows[:, 1], rows[:, 2], color=style["color"], alpha=0.15)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("edits", fontsize=9)
        axes.set_ylim(0, 102)
        bare_axes(axes)
    panels[0].set_ylabel("%", fontsize=9)
    panels[0].legend(fontsize=8, frameon=False, loc="lower left")
    return png(figure)


def _shown(shares: Sequence[float | None]) -> str:
    found = interval(shares)
    if found is None:
        return "–"
    mean, low, high = found
    return f"{mean:.1f} [{low:.0f}, {high:.0f}]"
