"""``hiedit record``: its options, read by the command line without torch."""

from __future__ import annotations

from pathlib import Path

from hiedit_benchmarks.commands.record_settings import RecordSettings
from hiedit_env.envs.settings import EditingSettings, settings


@settings
class Record:
    """Record episodes in which every option is tried: data for offline RL and bandits.

    A folder with a Parquet file, a Minari data set and a description is written.
    """

    out: Path
    """folder of the recording; must not exist or be empty"""
    recording: RecordSettings = RecordSettings()
    editing: EditingSettings = EditingSettings()

    def run(self) -> int:
        """Records."""
        from hiedit_benchmarks.commands import record

        return record.main(self.recording, self.editing, self.out)
