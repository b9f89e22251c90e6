"""Every script of ``agents/rl`` runs as a module and as a file.

Most of a start is the import of torch, so all but one per way of starting are forks of a process
that has imported it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
LIBRARIES = [name for name, library in SCRIPTS.items() if library]
#: Answers a line of JSON per job with a line of JSON; a job runs in a fork.
SERVER = """
import json, os, runpy, sys, tempfile, traceback
import torch, transformers, hiedit_env.envs.vector, hiedit_agents.policies.agent

assert not set(json.loads(sys.argv[1])) & set(sys.modules), "a job would not import it anew"

def run(job):
    sys.path[:0] = job["front"]
    if job["missing"]:
        sys.modules[job["missing"]] = None  # as if it were not installed
    sys.argv[:] = [job["what"], "--help"]
    if job["how"] == "module":
        runpy.run_module(job["what"], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(job["what"], run_name="__main__")

answers = os.fdopen(os.dup(1), "w")
for line in sys.stdin:
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
                run(json.loads(line))
                status = 0
            except SystemExit as stopped:
                status = stopped.code or 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(status)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out.seek(0), err.seek(0)
        answers.write(json.dumps([code, out.read(), err.read()]) + "\\n")
        answers.flush()
"""


def command(how: str, script: str) -> tuple[str, list[str]]:
    """The module or file of a script, and what Python puts in front of the search path."""
    if how == "module":
        return f"hiedit_agents.rl.{script}", []
    # "python agents/rl/X.py" puts the folder of the script in front, which must do no harm.
    return str(ROOT / f"agents/rl/{script}.py"), [str(ROOT / "agents" / "rl")]


class Server:
    """Runs scripts with ``--help`` in forks of one process."""

    def __init__(self) -> None:
        libraries = json.dumps([library[0] for library in SCRIPTS.values() if library])
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVER, libraries],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, how: str, script: str, missing: str = "") -> tuple[int, str, str]:
        """Exit status, standard output and standard error."""
        what, front = command(how, script)
        job = {"how": how, "what": what, "front": front, "missing": missing}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        found: Any = json.loads(self._process.stdout.readline())
        return int(found[0]), str(found[1]), str(found[2])

    def stop(self) -> None:
        self._process.communicate(timeout=60)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.stop()


def test_every_script_is_in_the_list() -> None:
    files = (ROOT / "agents" / "rl").glob("*.py")
    scripts = {path.stem for path in files if "__main__" in path.read_text(encoding="utf-8")}
    assert scripts - {"command"} == set(SCRIPTS)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["module", "file"])
def test_a_process_of_its_own(how: str) -> None:
    """As a user starts it; SB3's script comes with the development tools, if any library does."""
    script = "train_sb3" if _is_installed("stable_baselines3") else "ppo"
    what, _ = command(how, script)
    words = ["-m", what] if how == "module" else [what]
    done = subprocess.run(
        [sys.executable, *words, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert f"usage: python -m hiedit_agents.rl.{script}" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("how", ["module", "file"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script: str, how: str, server: Server) -> None:
    library = SCRIPTS[script]
    if library is not None:
        pytest.importorskip(library[0])
    code, out, err = server.run(how, script)
    assert code == 0, err
    assert f"usage: python -m hiedit_agents.rl.{script}" in out
    assert "--out" in out


@pytest.mark.parametrize("how", ["module", "file"])
@pytest.mark.parametrize("script", LIBRARIES)
def test_a_missing_library_is_one_line_that_names_the_extra(
    script: str, how: str, server: Server
) -> None:
    library = SCRIPTS[script]
    assert library is not None
    code, out, err = server.run(how, script, missing=library[0])
    assert code == 2, out + err
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert f"'.[{library[1]}]'" in line


def _is_installed(library: str) -> bool:
    try:
        __import__(library)
    except ImportError:
        return False
    return True
