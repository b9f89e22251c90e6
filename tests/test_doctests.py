"""The examples in the docstrings of every module, under the names the packages are installed by."""

import doctest
import importlib
import pkgutil

import pytest

PACKAGES = ("hiedit_env", "hiedit_agents", "hiedit_benchmarks")
#: Scripts of libraries that the development environment does not hold.
LIBRARIES = tuple(
    f"hiedit_agents.rl.train_{name}" for name in ("rllib", "skrl", "tianshou", "torchrl")
)


def modules() -> list[str]:
    found = list(PACKAGES)
    for package in PACKAGES:
        path = importlib.import_module(package).__path__
        found += [info.name for info in pkgutil.walk_packages(path, f"{package}.")]
    return [name for name in found if name not in LIBRARIES]


@pytest.mark.parametrize("name", modules())
def test_examples(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_walk_finds_modules_of_every_package() -> None:
    found = modules()
    assert "hiedit_env.datasets.streams" in found
    assert "hiedit_agents.rl.ppo" in found
    assert "hiedit_benchmarks.comparison.statistics" in found
