"""How a model is served; read by the command line without torch."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Annotated

from pydantic import Field

from hiedit_benchmarks.commands.stream_settings import Share
from hiedit_env.envs.settings import AtLeast1, Must, settings
from hiedit_env.errors import SettingsError

#: Where the token is looked for, so that it need not stand in a command line.
TOKEN = "HIEDIT_TOKEN"
Port = Annotated[int, Field(ge=0, le=65535), Must("a number from 0 to 65535")]


@settings
class ServeSettings:
    """Who may ask and edit, where, and what is kept."""

    ledger: Path | None = None
    """folder of the ledger, gone on with if it is there; by default the edits are lost when the
    server stops"""
    host: str = "127.0.0.1"
    """address to listen on; by default only this machine reaches it. With any other, questions
    need the token too"""
    port: Port = 8000
    """port to listen on; 0 for one that is free"""
    token: str | None = None
    """what requests that edit must carry; by default $HIEDIT_TOKEN, else one is made and printed"""
    answers_at_once: AtLeast1 = 4
    """answers that are generated at the same time; others wait in order"""
    min_agreement: Share = 0.6
    """roll an edit back that leaves less agreement with the unedited model"""
    max_lost: Share = 0.25
    """roll an edit back that breaks a larger share of the earlier facts asked"""

    def settled_token(self) -> tuple[str, bool]:
        """The token, and whether it was made here.

        Raises:
            SettingsError: an empty one, or one that a header cannot hold.
        """
        given = os.environ.get(TOKEN) if self.token is None else self.token
        if given is None:
            return secrets.token_urlsafe(24), True
        if not given.isascii() or not given.isprintable() or not given or " " in given:
            source = TOKEN if self.token is None else "--token"
            raise SettingsError(
                f"{source} must be ASCII characters without spaces, at least one; give another, or "
                "none to have one made"
            )
        return given, False
