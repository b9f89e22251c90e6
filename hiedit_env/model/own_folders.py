"""Folders of the models that come with this package, and of planted worlds, which it makes."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from hiedit_env.datasets.difficulty import is_world
from hiedit_env.model.built_in import built_in
from hiedit_env.model.planted_world import world_folder


def own_folder(name: str, cache: Path) -> Path | None:
    """The folder of a model of this package's own; None for any other model.

    Args:
        name: As for :func:`~hiedit_env.model.loading.load_model`.
        cache: Where planted worlds are kept; one that is not there yet is made.

    Raises:
        SettingsError: the name begins like that of a planted world, and there is no such world.
        OutputError: a world cannot be written into the cache.
    """
    if is_world(name):
        return world_folder(name, cache)
    if built_in(name).shipped:
        return Path(str(files("hiedit_env.model").joinpath("assets", name)))
    return None
