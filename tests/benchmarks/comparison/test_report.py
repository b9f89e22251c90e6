"""What a comparison prints: width, legend, characters, colours."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hiedit_benchmarks.comparison.console import encodable, replace_what_cannot_be_encoded
from hiedit_benchmarks.comparison.report import TABLES, WIDTH, as_text, report, show
from hiedit_benchmarks.comparison.statistics import MEASURES, summarise

NAMES = ("efficacy", "generalization", "specificity", "retention")


def row(agent: str, seed: int, value: float = 50.0, **more: Any) -> dict[str, Any]:
    metric = {"token_accuracy": value, "exact_match": value, "generation": value}
    return {
        "agent": agent,
        "seed": seed,
        "num_edits": 7,
        "error_type": None,
        "metrics": {
            **dict.fromkeys(NAMES, metric),
            "specificity": {**metric, "agreement": value},
            "efficacy_right_after": metric,
            "forgetting": -value,
        },
        "layers_per_edit": 2.0,
        "steps_per_edit": 1.0,
        "seconds_per_edit": 0.5,
        **more,
    }


def oracle(**more: float) -> dict[str, float]:
    return {"regret": 1.25, "one_step_regret": 0.5, "true_layer_share": 75.0, **more}


def test_every_column_is_a_measure_and_no_measure_is_left_out() -> None:
    shown = [column.measure for _, columns in TABLES for column in columns]
    assert sorted(shown) == sorted(MEASURES)


def test_text_of_one_agent_by_hand() -> None:
    found = row("no-edit", 0)
    for name in NAMES:
        del found["metrics"][name]["generation"]
        break
    text = as_text(report(summarise([found]), {}, None, [found]))
    assert text.splitlines()[:7] == [
        "Edited facts, % (answers that the model generates freely, then teacher forcing)",
        "agent    exact  right after  forgetting",
        "───────────────────────────────────────",
        "no-edit   50.0         50.0       -50.0",
        "  exact       given the answer's beginning, every token is right",
        "  right after efficacy of a fact right after its own edit",
        "  forgetting  right after minus efficacy, of the edited facts",
    ]
    assert text.splitlines()[-1] == "Means over facts and seeds."
    assert "oracle" not in text
    assert "Difference" not in text


def test_text_says_who_is_better_by_how_much_and_who_ended_early() -> None:
    rows = [row("no-edit", 0), row("a", 0), row("b", 0, error_type="numerical_collapse")]
    interval = {"difference": 3.25, "low": -1.0, "high": 4.0}
    paired = {"no-edit": {"average": interval}, "b": {"average": interval, "efficacy": interval}}
    text = as_text(report(summarise(rows), paired, "a", rows))
    lines = text.splitlines()
    start = lines.index("Difference from a on the same facts, points [95 % interval]")
    assert lines[start + 1].split() == ["agent", "average", "efficacy"]
    assert lines[start + 3] == "b      +3.2 [-1.0, +4.0]  +3.2 [-1.0, +4.0]"
    # The unedited model is not among the pairs.
    assert lines[start + 4 :] == ["b, seed 0: the episode ended after 7 edits (numerical_collapse)"]


def test_tables_of_chat_neighbours_and_portability_are_there_where_measured() -> None:
    found = row("a", 0)
    silent = as_text(report(summarise([found]), {}, None, [found]))
    assert "chat" not in silent
    assert "Portability" not in silent
    value = {"token_accuracy": 12.5, "generation": 25.0, "agreement": 37.5}
    kinds = ("alias", "reversed", "multi-hop", "logical generalization")
    found["metrics"] |= {
        **{f"chat_{name}": value for name in NAMES},
        "neighbours": value,
        "portability": value,
        **{f"portability/{kind}": value for kind in kinds},
    }
    lines = as_text(report(summarise([found]), {}, None, [found])).splitlines()

    def table(title: str) -> list[list[str]]:
        start = next(i for i, line in enumerate(lines) if line.startswith(title))
        return [lines[start + 1].split(), lines[start + 3].split()]

    # 3 / (1/50 + 1/50 + 1/37.5) and 3 / (1/25 + 1/25 + 1/37.5).
    assert table("In other words") == [
        ["agent", "paraphr.", "neighbours", "harmonic"],
        ["a", "50.0", "37.5", "45.0"],
    ]
    assert table("Asked in chat, % (answers") == [
        ["agent", "fact", "paraphr.", "agreement", "harmonic"],
        ["a", "25.0", "25.0", "37.5", "28.1"],
    ]
    assert table("Portability: what") == [["agent", "generated", "tokens"], ["a", "25.0", "12.5"]]
    by_kind = [i for i, line in enumerate(lines) if line == "Portability by kind, generated, %"]
    assert lines[by_kind[0] + 1].split() == ["agent", "alias", "reversed", "multi-hop"]
    assert lines[by_kind[1] + 1].split() == ["agent", "logical", "general"]
    assert max(map(len, lines)) <= WIDTH


@pytest.mark.parametrize("agent", ["random-layers+rehearsal", "/a/" + "b" * 300, "字" * 50])
def test_text_fits_80_columns(agent: str) -> None:
    values = np.random.default_rng(0).uniform(0, 100, 3)
    rows = [
        row(name, seed, float(value), error_type="numerical_collapse")
        for name in ("no-edit", "all-layers", agent)
        for seed, value in enumerate(values)
    ]
    for found in rows:
        found["metrics"] |= oracle(regret=-123.456, true_layer_exact_share=100.0)
    interval = {"difference": -100.0, "low": -100.0, "high": -99.9}
    paired = {agent: dict.fromkeys(("generated", "average", "agreement", "efficacy"), interval)}
    text = as_text(report(summarise(rows), paired, "all-layers", rows))
    # A Chinese character takes two columns of a terminal.
    assert max(len(line) + line.count("字") for line in text.splitlines()) <= WIDTH == 80
    assert "…" not in text
    assert "± is half of the 95 % t-interval over 3 seeds" in text
    assert text.count("-100.0 [-100.0, -99.9]") == 3


@pytest.mark.parametrize(
    ("agent", "tables"),
    [("rledit", 1), ("random-layers+rehearsal", 2), ("fixed-layers,layers_per_edit=4:5+ridge", 3)],
)
def test_a_long_name_stays_on_one_line_of_the_differences(agent: str, tables: int) -> None:
    rows = [row(name, 0, 50.0) for name in ("all-layers", agent)]
    interval = {"difference": -100.0, "low": -100.0, "high": -99.9}
    paired = {agent: dict.fromkeys(("generated", "average", "agreement", "efficacy"), interval)}
    text = as_text(report(summarise(rows), paired, "all-layers", rows))
    lines = text[text.index("Difference from") :].splitlines()
    assert sum(line.startswith(f"{agent} ") for line in lines) == tables
    assert max(map(len, lines)) <= WIDTH
    assert text.count("-100.0 [-100.0, -99.9]") == 3


def test_a_column_that_the_encoding_lacks_is_replaced_before_it_is_aligned() -> None:
    rows = [row("a", 0, 50.0), row("a", 1, 52.0), row("b", 0, 7.0), row("b", 1, 7.0)]
    lines = as_text(report(summarise(rows), {}, None, rows, encoding="ascii")).splitlines()
    cells = [line for line in lines if line.startswith(("a ", "b "))]
    assert cells[0].split()[1] == "51.0+-12.7"
    assert len({len(line) for line in cells[:2]}) == 1, "right-aligned all the same"


class Ascii(io.TextIOWrapper):
    def __init__(self, encoding: str) -> None:
        super().__init__(io.BytesIO(), encoding=encoding)

    def text(self) -> str:
        self.flush()
        buffer = self.buffer
        assert isinstance(buffer, io.BytesIO)
        return buffer.getvalue().decode(self.encoding)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_no_encoding_breaks_the_output(encoding: str) -> None:
    rows = [row("字 −1", 0, 50.0), row("字 −1", 1, 52.0)]
    file = Ascii(encoding)
    show(report(summarise(rows), {}, None, rows, encoding=encoding), file)
    text = file.text()
    assert ("字 −1" if encoding == "utf-8" else "? -1") in text
    assert ("51.0+-12.7" if encoding == "ascii" else "51.0±12.7") in text
    assert "\x1b" not in text


def test_substitutes() -> None:
    assert encodable("± − – … → ≥ é 字", "ascii") == "+- - - ... -> >= ? ?"
    assert encodable("± − – … → ≥ é 字", "cp1252") == "± - – … -> >= é ?"
    assert encodable("± 字", None) == "± 字"
    # A stream that is no text file, as in notebooks, is left alone.
    replace_what_cannot_be_encoded(io.StringIO())


PROGRAM = """
import sys
from hiedit_benchmarks.comparison.report import report, show
from hiedit_benchmarks.comparison.statistics import summarise
from tests.benchmarks.comparison.test_report import row
rows = [row("no-edit", 0), row("a", 0)]
show(report(summarise(rows), {}, None, rows, encoding=sys.stdout.encoding))
"""


def on_a_terminal(**environment: str) -> str:
    """What the program prints where its standard output is a terminal of 200 columns."""
    leader, follower = pty.openpty()
    own = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdout=follower,
        env={**own, "TERM": "xterm-256color", "COLUMNS": "200", **environment},
        cwd=Path(__file__).parents[3],
    ) as process:
        os.close(follower)
        parts = []
        while True:
            try:
                part = os.read(leader, 65536)
            except OSError:  # the terminal is gone
                break
            if not part:
                break
            parts.append(part)
        os.close(leader)
    assert process.returncode == 0
    return b"".join(parts).decode()


def test_a_terminal_gets_bold_text_and_no_more_than_80_columns() -> None:
    text = on_a_terminal()
    assert "\x1b[1m" in text
    plain = on_a_terminal(TERM="dumb")
    assert "\x1b" not in plain
    assert max(map(len, plain.splitlines())) <= 80
    assert "Means over facts and seeds." in plain


def test_no_color_is_respected() -> None:
    text = on_a_terminal(NO_COLOR="1")
    # Bold and dim may stay; colours are the codes from 30 on.
    assert not any(f"\x1b[{code}m" in text for code in range(30, 108))
    assert "38;" not in text
