"""Settings of ``hiedit record``; read by the command line without torch."""

from __future__ import annotations

from typing import Literal

from hiedit_env.envs.settings import AtLeast0, AtLeast1, settings

#: Families of options: all subsets of the layers; single layers; pairs; contiguous ranges. The
#: empty set and all layers belong to each.
Family = Literal["subsets", "singles", "pairs", "ranges"]


@settings
class RecordSettings:
    """Which options are tried, in which episodes."""

    options: Family = "subsets"
    """which options are tried on every fact: subsets (all 2^L, for up to 8 layers), singles, pairs
    or ranges of neighbouring layers; no layer and all layers are always among them"""
    episodes: AtLeast1 = 4
    """episodes, each on a stream of its own"""
    seed: AtLeast0 = 0
    """of the first episode; the next ones have the next seeds"""
    version: Literal[1, 2] = 2
    """version of the environment's id"""
    chunk: AtLeast1 | None = None
    """options at a time; by default as many as fit into half of the free memory"""
