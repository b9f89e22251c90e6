"""Options of ``hiedit edit --facts -``; read by the command line without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from hiedit_env.envs.settings import AtLeast1, Must, settings

Share = Annotated[float, Field(ge=0, le=1), Must("a number from 0 to 1")]


@settings
class StreamSettings:
    """Facts as they come, with --facts -: what is checked, and when to stop."""

    ledger: Path | None = None
    """folder of a ledger that is written fact by fact, and gone on with if it is there, so that
    nothing is lost when the command is interrupted; by default only OUT gets one, at the end; works
    with a file as well"""
    health_every: AtLeast1 = 100
    """edits between two lines about the health of the model"""
    stop_below: Share = 0.0
    """stop when the share of edited facts still given, or the agreement with the unedited model,
    falls under this"""
    min_agreement: Share = 0.6
    """roll an edit back that leaves less agreement with the unedited model"""
    max_lost: Share = 0.25
    """roll an edit back that breaks a larger share of the earlier facts asked"""
