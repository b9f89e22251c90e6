"""Wheel and sdist: built from a clean copy, installed away from the checkout, used from there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"hiedit_env": "hiedit_env", "hiedit_agents": "agents", "hiedit_benchmarks": "benchmarks"}
#: What git ignores, and git's own folder.
IGNORED = shutil.ignore_patterns(
    ".git", ".venv*", ".links", ".*_cache", ".hypothesis", "__pycache__", "*.egg-info",
    "build", "dist", "demo", "runs", "site",
)  # fmt: skip
LINK = re.compile(r"\]\((?!https?:|#|mailto:)(?P<target>[^)\s#]+)")

#: Runs where the wheel was installed; its arguments are that folder and one for results.
USE = """
import sys
from pathlib import Path

import gymnasium as gym

import hiedit_agents, hiedit_benchmarks, hiedit_env
from hiedit_benchmarks.commands import cli

target, out = map(Path, sys.argv[1:])
for package in (hiedit_env, hiedit_agents, hiedit_benchmarks):
    assert target in Path(package.__file__).parents, package.__file__
ids = sorted(name for name in gym.registry if name.startswith("hiedit/"))
for name in ids:
    env = gym.make(name, num_edits=1)
    env.reset(seed=0)
    env.action_space.seed(0)
    env.step(env.action_space.sample())
    env.close()
    print(name)
for model, agent in (("tiny", "all-layers"), ("planted", "hiedit")):
    # On the planted world "hiedit" plays the weights that ship with the package.
    arguments = ["compare", "--model", model, "--num-edits", "2", "--agents", agent]
    assert cli.main([*arguments, "--out", str(out / model)]) == 0
    assert (out / model / "summary.json").is_file()
foreign = [
    module.__file__
    for name, module in sys.modules.items()
    if name.startswith("hiedit_") and target not in Path(module.__file__).parents
]
assert not foreign, foreign
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist, and the wheel that was built from it."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("packaging")
    shutil.copytree(ROOT, folder / "tree", ignore=IGNORED)
    command = ["-m", "build", "--no-isolation", "--outdir", str(folder), str(folder / "tree")]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


def files_of_packages() -> set[str]:
    """Every file below the three packages, under the names they are installed by."""
    return {
        f"{package}/{path.relative_to(ROOT / folder).as_posix()}"
        for package, folder in FOLDERS.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_list_of_packages_is_that_of_the_tree() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed = settings["tool"]["setuptools"]["packages"]
    found = {
        name.rpartition("/")[0].replace("/", ".")
        for name in files_of_packages()
        if name.endswith("/__init__.py")
    }
    assert set(listed) == found
    assert len(listed) == len(found)
    # A folder of modules without an __init__.py would be left out without a word.
    assert {name.rpartition("/")[0].replace("/", ".") for name in files_of_packages()
            if name.endswith(".py")} == found  # fmt: skip


def test_the_wheel_brings_three_names_and_every_file_of_the_packages(
    built: tuple[Path, Path],
) -> None:
    with zipfile.ZipFile(built[1]) as wheel:
        names = set(wheel.namelist())
    tops = {name.split("/")[0] for name in names}
    assert {name for name in tops if not name.endswith(".dist-info")} == set(FOLDERS)
    assert len(tops) == len(FOLDERS) + 1
    assert {name for name in names if name.split("/")[0] in FOLDERS} == files_of_packages()


def test_the_sdist_holds_what_its_pages_link_to(built: tuple[Path, Path], tmp_path: Path) -> None:
    with tarfile.open(built[0]) as archive:
        archive.extractall(tmp_path, filter="data")
    (inside,) = tmp_path.iterdir()
    links = {
        (page.relative_to(inside).as_posix(), match["target"])
        for page in (*inside.glob("*.md"), *inside.glob("docs/**/*.md"))
        for match in LINK.finditer(page.read_text(encoding="utf-8"))
    }
    assert {"docs/architecture.md"} <= {target for page, target in links if page == "README.md"}
    broken = [(page, to) for page, to in links if not (inside / page).parent.joinpath(to).exists()]
    assert not broken
    # What "make test" in the unpacked folder needs.
    for name in ("Makefile", "constraints.txt", "tests/conftest.py", ".ci/run", "mkdocs.yml"):
        assert (inside / name).is_file(), name
    assert not [path for path in inside.rglob("*") if path.name in ("__pycache__", ".links")]


def test_the_installed_wheel_works_away_from_the_checkout(
    built: tuple[Path, Path], tmp_path: Path
) -> None:
    target, out = tmp_path / "installed", tmp_path / "out"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--target", str(target), str(built[1])], check=True)
    tops = {path.name for path in target.iterdir() if not path.name.endswith(".dist-info")}
    assert tops - {"bin"} == set(FOLDERS)
    environment = {**os.environ, "PYTHONPATH": str(target), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", USE, str(target), str(out)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("LayerSelection", "LifelongEdit", "Planted", "StepSize", "Toy"):
        assert f"hiedit/{name}-v1\n" in done.stdout
