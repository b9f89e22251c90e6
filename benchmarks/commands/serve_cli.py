"""Options of ``hiedit serve``; read by the command line without torch."""

from __future__ import annotations

from hiedit_benchmarks.commands.serve_settings import ServeSettings
from hiedit_benchmarks.comparison.settings import EditSettings, Ending
from hiedit_env.envs.settings import settings
from hiedit_env.errors import require_libraries


@settings
class Serve:
    """Serve a model that is edited while it answers, with a page in the browser.

    It speaks OpenAI's interface (/v1/chat/completions, /v1/completions, /v1/models); NAME:unedited
    is the model without edits. POST /edits writes a fact, DELETE /edits/ID takes it back.
    """

    agent: str | None = None
    """who edits; by default hiedit if a trained one fits the model, else all-layers"""
    ending: Ending = Ending()
    editing: EditSettings = EditSettings()
    server: ServeSettings = ServeSettings()

    def run(self) -> int:
        """Serves until it is interrupted."""
        require_libraries("serve", "fastapi", "uvicorn")
        from hiedit_benchmarks.commands import serve

        return serve.main(self.editing, self.agent, self.ending.chosen, self.server)
