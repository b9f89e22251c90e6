"""The editor of a command that edits facts as they come."""

from __future__ import annotations

from pathlib import Path

from hiedit_agents.editing.checks import Checks
from hiedit_agents.editing.editor import Editor
from hiedit_benchmarks.comparison.settings import EditSettings


def live_editor(
    settings: EditSettings,
    agent: str | None,
    end_token: bool | None,
    ledger: Path | None,
    checks: Checks,
) -> Editor:
    """Loads the model and makes its editor.

    Args:
        settings: The model and how it is edited.
        agent: Who edits; None for the default of :class:`~hiedit_agents.Editor`.
        end_token: As there.
        ledger: Folder of the ledger; None for memory.
        checks: What every edit has to pass.

    Raises:
        LedgerError: the ledger is of another model; it is as it was.
        ModelError: the model cannot be loaded.
        SettingsError: the agent does not fit the model.
    """
    return Editor.from_pretrained(
        settings.model,
        device=settings.device,
        dtype=settings.dtype,
        trust_remote_code=settings.trust_remote_code,
        agent=agent,
        layers=settings.layers,
        ledger=ledger,
        checks=checks,
        prompt_form=settings.prompt_form,
        end_token=end_token,
        layers_per_edit=settings.layers_per_edit,
        max_steps_per_edit=settings.max_steps_per_edit,
        step_size=settings.step_size,
        update_rule=settings.update_rule,
        memory_check=settings.memory_check,
    )
