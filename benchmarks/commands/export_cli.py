"""Options of ``hiedit export``; read by the command line without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro

from hiedit_agents.command_line import Switch
from hiedit_benchmarks.commands.undo_cli import Folder
from hiedit_env.envs.settings import AtLeast1, settings
from hiedit_env.errors import SettingsError, require_libraries

Kind = Literal["folder", "adapter", "delta", "gguf"]


@settings
class Export:
    """Write the edits of a ledger for other programs.

    A folder for transformers, a LoRA adapter in PEFT's format, the edited matrices alone, or one
    GGUF file for llama.cpp and ollama. The unedited model is read from where the ledger says.
    """

    folder: Folder
    """the folder of a ledger, or a saved model with one"""
    out: Path
    """what is written: a folder that does not exist or is empty, of delta and gguf a file"""
    kind: Annotated[Kind, tyro.conf.arg(name="as")]
    """folder: the whole edited model; adapter: LoRA; delta: the edited matrices; gguf: one file"""
    base: Path | None = None
    """folder of the unedited model; by default where the ledger says"""
    max_rank: AtLeast1 | None = None
    """adapter: largest rank; by default as much as makes it exact"""
    allow_loss: Switch = False
    """adapter: write one that gives fewer facts, too"""
    type: Literal["f32", "f16", "q8_0", "q4_0", "q4_1"] | None = None
    """gguf: how weights are stored; by default f16"""

    def __post_init__(self) -> None:
        options = {
            "--max-rank": ("adapter", self.max_rank),
            "--allow-loss": ("adapter", self.allow_loss),
            "--type": ("gguf", self.type),
        }
        for name, (kind, value) in options.items():
            if value and kind != self.kind:
                raise SettingsError(f"{name} is for --as {kind}; leave it out")

    def run(self) -> None:
        """Writes it."""
        if self.kind == "gguf":
            require_libraries("demo", "gguf")
        from hiedit_benchmarks.commands import export

        rank, loss = self.max_rank, self.allow_loss
        with export.opened(self.folder, self.base) as editor:
            if self.kind == "folder":
                print(export.folder(editor, self.out))
            elif self.kind == "adapter":
                print(export.adapter(editor, self.out, rank, loss))
            elif self.kind == "delta":
                print(export.delta(editor, self.out))
            else:
                print(export.gguf(editor, self.out, self.type or "f16"))
