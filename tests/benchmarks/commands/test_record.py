"""``hiedit record`` before anything is recorded."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from hiedit_benchmarks.commands import record
from hiedit_benchmarks.commands.record_settings import RecordSettings
from hiedit_env.envs.settings import EditingSettings
from hiedit_env.errors import MissingLibraryError


def test_a_missing_library_is_named_before_anything_is_recorded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def made(*_: Any, **__: Any) -> None:
        raise AssertionError("an environment was made")

    monkeypatch.setattr(record.gymnasium, "make", made)
    # None in the table of modules: the import fails, whether it is installed or not.
    monkeypatch.setitem(sys.modules, "minari", None)
    with pytest.raises(MissingLibraryError, match=r"minari.*offline"):
        record.main(RecordSettings(), EditingSettings(), tmp_path / "recorded")
    assert not (tmp_path / "recorded").exists()
