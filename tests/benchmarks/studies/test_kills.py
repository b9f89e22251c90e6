"""Work that is really killed is gone on with; and the study notices what would be wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hiedit_benchmarks.studies.killed_work import WORKS, Work
from hiedit_benchmarks.studies.kills import kill_at_random, main, run_until

_NAMES = [work.name for work in WORKS]


@pytest.mark.parametrize("name", _NAMES)
def test_killed_work_is_gone_on_with(name: str, tmp_path: Path) -> None:
    work = WORKS[_NAMES.index(name)]
    found = kill_at_random(work, 1, np.random.default_rng(_NAMES.index(name)), tmp_path, most=1)
    assert found.faults == ()
    assert found.kills >= 1


def test_what_is_applied_twice_is_noticed(tmp_path: Path) -> None:
    """A work that appends a line after the line, however often it is begun."""

    def run(folder: Path) -> int:
        for line in "abc":
            with (folder / "lines").open("a") as file:
                file.write(line)
        (folder / "ended").touch()
        return 0

    def check(folder: Path, whole: Path) -> list[str]:
        one, two = ((place / "lines").read_text() for place in (folder, whole))
        return [] if one == two else [f"{one}, not {two}"]

    work = Work("naive", lambda folder: None, run, check)
    assert run_until(work, tmp_path, None) == 0
    assert (tmp_path / "ended").exists()
    # As after a kill at the second line.
    (tmp_path / "trial").mkdir()
    (tmp_path / "trial" / "lines").write_text("ab")
    assert run_until(work, tmp_path / "trial", None) == 0
    assert check(tmp_path / "trial", tmp_path) == ["ababc, not abc"]


def test_a_work_that_fails_says_why(tmp_path: Path) -> None:
    def fail(folder: Path) -> int:
        raise ValueError("no luck")

    work = Work("failing", lambda folder: None, fail, lambda folder, whole: [])
    found = kill_at_random(work, 1, np.random.default_rng(0), tmp_path)
    assert found.kills == 0
    assert "status 70: ValueError: no luck" in found.faults[0]


def test_options_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert "--kills" in capsys.readouterr().out
