"""What is left of a stream of edits: a table in Markdown with intervals, and the picture."""

from __future__ import annotations

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
    "other subjects": ("neighbours", "chat_neighbours"),
    "control questions in chat": ("controls",),
}


def interval(shares: Sequence[float | None], seed: int = 0) -> tuple[float, float, float] | None:
    """Mean in percent, with a 95 % bootstrap interval over facts; None without numbers.

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
        lines.append(f"| {check['edits']} | {' | '.join(cells)} | {check['seconds']:.1f} |")
    return "\n".join(lines) + "\n"


def draw(checks: Sequence[Mapping[str, Any]]) -> bytes:
    """The picture as PNG: facts, paraphrases and other subjects over the stream.

    Raises:
        MissingLibraryError: matplotlib is not installed.
    """
    figure = new_figure(9, 4, dpi=110, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    edits = [check["edits"] for check in checks]
    for form, title, axes in zip((0, 1), ("plain", "in chat"), panels, strict=True):
        for index, (label, names) in enumerate(COLUMNS.items()):
            if form >= len(names):
                continue
            found = [interval(check["shares"].get(names[form], ())) for check in checks]
            if any(one is None for one in found):
                continue
            rows = np.array(found)
            style = line_style(index)
            axes.plot(edits, rows[:, 0], marker="o", markersize=4, label=label, **style)
            axes.fill_between(edits, rows[:, 1], rows[:, 2], color=style["color"], alpha=0.15)
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
