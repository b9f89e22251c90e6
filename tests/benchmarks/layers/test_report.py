"""The table of layers in a window of 80 columns."""

from __future__ import annotations

import io

from rich.console import Console

from hiedit_benchmarks.layers.report import table
from tests.benchmarks.layers.test_scores import scored


def shown(*names: str) -> list[str]:
    scores = [scored(name, 100.0 - i) for i, name in enumerate(names)]
    file = io.StringIO()
    made = table(scores, names[:1], names[1:2], encoding="utf-8")
    Console(file=file, width=80).print(made)
    return file.getvalue().splitlines()


def test_names_of_usual_length_stand_in_one_line() -> None:
    kinds = ("self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    lines = shown(*(f"model.layers.{block}.{kind}" for block in (2, 27) for kind in kinds))
    assert lines[2].startswith("*  2 o_proj ")
    assert lines[3].startswith(" d 2 gate_proj ")
    assert lines[6].startswith("   27 gate_proj ")
    assert all("100." in line or "99." in line for line in lines[2:4])
    # The longest bar is cut off where it must be, and is still the longest.
    assert "■■■" in lines[2]
    assert all(len(line) <= 80 for line in lines)


def test_a_very_long_name_is_folded_and_complete() -> None:
    long = "model.layers.3." + "a_very_long_name_of_a_module" * 2
    lines = shown(long, "model.layers.3.mlp.up_proj")
    joined = "".join(line[: len("*  ") + 17].strip() for line in lines[2:8]).replace("*", "")
    assert "a_very_long_name_of_a_module" in joined.replace(" ", "")
