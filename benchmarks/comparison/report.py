"""A comparison in print: small tables that fit 80 columns, with a legend in plain words."""

from __future__ import annotations

import io
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TextIO

from rich import box
from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from hiedit_benchmarks.comparison.console import encodable, replace_what_cannot_be_encoded
from hiedit_benchmarks.comparison.results import UNEDITED, Row
from hiedit_benchmarks.comparison.statistics import PairedDifferences, Summary

#: Columns of a page, where the output is no terminal and as the most that a terminal's width is
#: used of: longer lines are hard to read.
WIDTH = 80


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a printed table.

    Args:
        measure: Key of the summary.
        heading: What stands above the column.
        meaning: What the legend says of it.
        digits: Decimal places.
    """

    measure: str
    heading: str
    meaning: str
    digits: int = 1


#: Title and columns of each table; a column without numbers, and a table without columns, is left
#: out.
TABLES: Sequence[tuple[str, Sequence[Column]]] = (
    (
        "Edited facts, % (answers that the model generates freely, then teacher forcing)",
        (
            Column("generated", "generated", "the model generates exactly the new answer"),
            Column("exact_match", "exact", "given the answer's beginning, every token is right"),
            Column("right_after", "right after", "efficacy of a fact right after its own edit"),
            Column("forgetting", "forgetting", "right after minus efficacy, of the edited facts"),
        ),
    ),
    (
        "In other words and beside the facts, %",
        (
            Column("paraphrases_generated", "paraphr.", "the same for paraphrases of the facts"),
            Column(
                "neighbour_agreement",
                "neighbours",
                "agreement on prompts that ask the same about other subjects",
            ),
            Column("unrelated_agreement", "unrelated", "agreement on the other unrelated prompts"),
            Column(
                "harmonic_mean",
                "harmonic",
                "harmonic mean of generated, paraphr. and neighbours (all unrelated prompts where "
                "the data names no neighbours)",
            ),
        ),
    ),
    (
        "Asked in chat, % (answers that the model generates freely, then agreement)",
        (
            Column("chat_generated", "fact", "the model generates exactly the new answer"),
            Column("chat_paraphrases_generated", "paraphr.", "the same for paraphrases"),
            Column("chat_agreement", "agreement", "with the unedited model in chat"),
            Column("chat_neighbour_agreement", "neighbours", "the same for neighbours"),
            Column("chat_harmonic_mean", "harmonic", "harmonic mean as above, in chat"),
        ),
    ),
    (
        "Asked in chat, teacher-forced token accuracy, % (overestimates)",
        (
            Column("chat_efficacy", "efficacy", "on the prompts of the edits"),
            Column("chat_generalization", "general.", "on their paraphrases"),
            Column("chat_specificity", "specific.", "true answers to unrelated prompts"),
            Column("chat_retention", "retention", "efficacy on the first third of the stream"),
        ),
    ),
    (
        "Portability: what follows from the facts, %",
        (
            Column("portability_generated", "generated", "the model generates exactly the answer"),
            Column("portability", "tokens", "teacher-forced token accuracy"),
            Column("chat_portability_generated", "in chat", "generated when asked in chat"),
        ),
    ),
    (
        "Teacher-forced token accuracy after the last edit, % (overestimates)",
        (
            Column("efficacy", "efficacy", "on the prompts of the edits"),
            Column("generalization", "general.", "generalization: on their paraphrases"),
            Column("specificity", "specific.", "specificity: true answers to unrelated prompts"),
            Column("retention", "retention", "efficacy on the first third of the stream"),
            Column("average", "average", "of these four"),
        ),
    ),
    (
        "Side effects and cost",
        (
            Column(
                "agreement",
                "agreement, %",
                "tokens of the unedited model's own answers to unrelated prompts that are still "
                "its first choice",
            ),
            Column("layers_per_edit", "layers/edit", "layers written for a fact"),
            Column("steps_per_edit", "steps/edit", "updates for a fact"),
            Column("seconds_per_edit", "s/edit", "seconds for a fact", 2),
        ),
    ),
    (
        "Against the oracle, which knows the right layers",
        (
            Column(
                "regret",
                "regret",
                "reward per fact that the oracle's own episode earns more (facts after an early "
                "end count as the last reward)",
                3,
            ),
            Column(
                "one_step_regret",
                "one step",
                "reward that the best layers would have earned more at the states that the agent "
                "met (small where the model is damaged already)",
                3,
            ),
            Column(
                "true_layer_share",
                "true layer, %",
                "of the facts not answered beforehand, those whose true layer was written",
            ),
            Column("true_layer_exact_share", "only it, %", "those where no other was written"),
        ),
    ),
)
#: Measures whose paired differences are printed; ``summary.json`` has them all.
_PAIRED_SHOWN = ("harmonic_mean", "generated", "agreement", "average", "efficacy")
#: Kinds of portability beside each other in one table.
_KINDS_SHOWN = 3


def report(
    summary: Summary,
    paired: PairedDifferences,
    baseline: str | None,
    rows: Sequence[Row],
    *,
    encoding: str | None = None,
) -> RenderableType:
    """Everything that a comparison prints.

    Args:
        summary: See :func:`~hiedit_benchmarks.comparison.statistics.summarise`.
        paired: Agent → measure → interval, the differences from the baseline.
        baseline: The agent that the others are compared with, if there is one.
        rows: Rows of the runs; those of episodes that ended early are named.
        encoding: Of the output; characters that it lacks are replaced.
    """

    def fit(text: str) -> str:
        return encodable(text, encoding)

    seeds = len({row["seed"] for row in rows})
    parts: list[RenderableType] = []
    for title, columns in (*TABLES, *_tables_of_portability(summary)):
        shown = [c for c in columns if any(c.measure in found for found in summary.values())]
        if shown:
            parts += [_title(title), _table(shown, summary, fit), _legend(shown, fit), ""]
    spread = "" if seeds < 2 else fit(f"; ± is half of the 95 % t-interval over {seeds} seeds")
    parts.append(Text(f"Means over facts and seeds{spread}."))
    differences = {name: found for name, found in paired.items() if name != UNEDITED and found}
    if differences:
        title = f"Difference from {baseline} on the same facts, points [95 % interval]"
        parts += ["", _title(fit(title)), *_paired_tables(differences, fit)]
    for row in rows:
        if row["error_type"]:
            parts.append(
                Text(
                    fit(
                        f"{row['agent']}, seed {row['seed']}: the episode ended after "
                        f"{row['num_edits']} edits ({row['error_type']})"
                    )
                )
            )
    return Group(*parts)


def _tables_of_portability(summary: Summary) -> list[tuple[str, Sequence[Column]]]:
    """Tables of the kinds that the data has, generated where that was measured."""
    measures = dict.fromkeys(measure for found in summary.values() for measure in found)
    for begin, read in (("portability_generated/", "generated"), ("portability/", "tokens right")):
        kinds = [m.removeprefix(begin) for m in measures if m.startswith(begin)]
        if kinds:
            columns = [
                Column(begin + kind, _heading(kind), f"prompts of kind {kind!r}") for kind in kinds
            ]
            return [
                (f"Portability by kind, {read}, %", columns[i : i + _KINDS_SHOWN])
                for i in range(0, len(columns), _KINDS_SHOWN)
            ]
    return []


def as_text(content: RenderableType) -> str:
    """The content as plain text of at most :data:`WIDTH` columns, without escape codes."""
    file = io.StringIO()
    console = Console(
        file=file, width=WIDTH, color_system=None, force_terminal=False, legacy_windows=False
    )
    console.print(content, highlight=False, markup=False)
    return "\n".join(line.rstrip() for line in file.getvalue().rstrip().splitlines())


def show(content: RenderableType, file: TextIO | None = None) -> None:
    """Prints: with bold and dim text on a terminal, plain elsewhere; rich honours ``NO_COLOR``.

    Args:
        content: What to print.
        file: Where to; standard output by default.
    """
    file = sys.stdout if file is None else file
    replace_what_cannot_be_encoded(file)
    console = Console(file=file)
    if not console.is_terminal:
        print(as_text(content), file=file)
        return
    console.print(content, width=min(console.width, WIDTH), highlight=False, markup=False)


def _title(text: str) -> Text:
    return Text(text, style="bold")


def _table(columns: Sequence[Column], summary: Summary, fit: Callable[[str], str]) -> Table:
    table = _empty([column.heading for column in columns])
    for agent, found in summary.items():
        cells = [_cell(found.get(column.measure), column.digits) for column in columns]
        _add(table, agent, cells, fit)
    return table


def _paired_tables(paired: PairedDifferences, fit: Callable[[str], str]) -> list[Table]:
    """One table, or several below each other where the agents' names leave no room for three."""
    known = [m for m in _PAIRED_SHOWN if any(m in found for found in paired.values())][:3]
    cells = {
        agent: [_interval_cell(found.get(m)) for m in known] for agent, found in paired.items()
    }
    # With the space before it.
    wide = 1 + max(cell_len(cell) for row in (known, *cells.values()) for cell in row)
    longest = max(cell_len(agent) for agent in paired)
    each = max(1, min(3, (WIDTH - longest) // wide))
    tables = []
    for start in range(0, len(known), each):
        tables.append(_empty(known[start : start + each]))
        for agent, row in cells.items():
            name = _on_lines(agent, WIDTH - wide * each)
            _add(tables[-1], name, row[start : start + each], fit)
    return tables


def _heading(kind: str) -> str:
    """The name of a kind, which comes from the data, as the heading of a narrow column.

    >>> _heading("logical generalization")
    'logical general'
    """
    return kind[:15].strip()


def _on_lines(agent: str, room: int) -> str:
    """A long name with line breaks where its parts end.

    >>> _on_lines("random-layers+rehearsal", 17).splitlines()
    ['random-layers+', 'rehearsal']
    """
    return agent if cell_len(agent) <= room else re.sub(r"(?<=[+,])", "\n", agent)


def _empty(headings: Sequence[str]) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        header_style="bold",
    )
    table.add_column(Text("agent"), overflow="fold")
    for heading in headings:
        table.add_column(Text(heading), justify="right", no_wrap=True)
    return table


def _add(table: Table, agent: str, cells: Sequence[str], fit: Callable[[str], str]) -> None:
    style = "dim" if agent == UNEDITED else None
    table.add_row(Text(fit(agent)), *(Text(fit(cell)) for cell in cells), style=style)


def _legend(columns: Sequence[Column], fit: Callable[[str], str]) -> Padding:
    table = Table.grid(padding=(0, 1), pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for column in columns:
        table.add_row(Text(column.heading, style="italic"), Text(fit(column.meaning)))
    return Padding(table, (0, 0, 0, 2))


def _cell(entry: Mapping[str, float | None] | None, digits: int) -> str:
    if entry is None or entry["mean"] is None:
        return "–"
    half = entry["half_width"]
    spread = "" if half is None else f"±{half:.{digits}f}"
    return f"{entry['mean']:.{digits}f}{spread}"


def _interval_cell(found: Mapping[str, float] | None) -> str:
    if found is None or not math.isfinite(found["difference"]):
        return "–"
    return f"{found['difference']:+.1f} [{found['low']:+.1f}, {found['high']:+.1f}]"
