"""Every script of ``agents/rl`` runs as a module and as a file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
#: Scripts, and the package and extra of those that need one.
SCRIPTS: dict[str, tuple[str, str] | None] = {
    "ppo": None,
    "train_rllib": ("ray", "rllib"),
    "train_sb3": ("stable_baselines3", "sb3"),
    "train_sb3_contrib": ("sb3_contrib", "sb3-contrib"),
    "train_skrl": ("skrl", "skrl"),
    "train_tianshou": ("tianshou", "tianshou"),
    "train_torchrl": ("torchrl", "torchrl"),
}
RUN = """
import runpy, sys
if sys.argv[1] != "-":
    sys.modules[sys.argv[1]] = None  # as if it were not installed
how, what = sys.argv[2:4]
sys.argv[:] = [what, "--help"]
{"module": lambda: runpy.run_module(what, run_name="__main__", alter_sys=True),
 "file": lambda: runpy.run_path(what, run_name="__main__")}[how]()
"""


def run(how: str, script: str, missing: str = "-") -> subprocess.CompletedProcess[str]:
    what = f"hiedit_agents.rl.{script}" if how == "module" else str(ROOT / f"agents/rl/{script}.py")
    # "python agents/rl/X.py" puts the folder of the script in front, which must do no harm.
    front = [str(ROOT / "agents" / "rl")] if how == "file" else []
    path = [*front, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return subprocess.run(
        [sys.executable, "-c", RUN, missing, how, what],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_every_script_is_in_the_list() -> None:
    files = (ROOT / "agents" / "rl").glob("*.py")
    scripts = {path.stem for path in files if "__main__" in path.read_text(encoding="utf-8")}
    assert scripts - {"command"} == set(SCRIPTS)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["module", "file"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script: str, how: str) -> None:
    library = SCRIPTS[script]
    if library is not None:
        pytest.importorskip(library[0])
    done = run(how, script)
    assert done.returncode == 0, done.stderr
    assert f"usage: python -m hiedit_agents.rl.{script}" in done.stdout
    assert "--out" in done.stdout


@pytest.mark.parametrize("how", ["module", "file"])
@pytest.mark.parametrize("script", [name for name, library in SCRIPTS.items() if library])
def test_a_missing_library_is_one_line_that_names_the_extra(script: str, how: str) -> None:
    library = SCRIPTS[script]
    assert library is not None
    done = run(how, script, missing=library[0])
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert f"'.[{library[1]}]'" in line
