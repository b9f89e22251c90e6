"""Options of the commands that look at edits and take them back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from hiedit_env.envs.settings import settings

Folder = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
Id = Annotated[int, tyro.conf.Positional, tyro.conf.arg(metavar="ID")]
One = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIR_A")]
Two = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIR_B")]


@settings
class Log:
    """List the edits of a ledger, and what was taken back."""

    folder: Folder
    """a saved model with a ledger, or the folder of an Editor's ledger"""

    def run(self) -> None:
        """Prints the list."""
        from hiedit_benchmarks.commands import ledger

        print(ledger.log(self.folder))


@settings
class Show:
    """Show all that a ledger says of one edit."""

    folder: Folder
    """a saved model with a ledger, or the folder of an Editor's ledger"""
    id: Id
    """id of the edit or other event, see 'hiedit log'"""

    def run(self) -> None:
        """Prints it."""
        from hiedit_benchmarks.commands import ledger

        print(ledger.show(self.folder, self.id))


@settings
class Revoke:
    """Take one edit of a saved model back.

    The weights become those that the other recorded updates give, as if this edit had never been
    written. Later updates stay as they are.
    """

    folder: Folder
    """a saved model with a ledger"""
    id: Id
    """id of the edit, see 'hiedit log'"""
    base: Path | None = None
    """folder of the unedited model; by default where the ledger says"""

    def run(self) -> None:
        """Takes it back."""
        from hiedit_benchmarks.commands import ledger

        print(ledger.revoke(self.folder, self.id, self.base))


@settings
class Rewind:
    """Bring a saved model back to an earlier state, bit for bit.

    Nothing is forgotten: a later state can be taken up again.
    """

    folder: Folder
    """a saved model with a ledger"""
    id: Id
    """id of the event whose state is wanted, see 'hiedit log'; 0 for the unedited model"""
    base: Path | None = None
    """folder of the unedited model; by default where the ledger says"""

    def run(self) -> None:
        """Goes back."""
        from hiedit_benchmarks.commands import ledger

        print(ledger.rewind(self.folder, self.id, self.base))


@settings
class Diff:
    """Tell what two models answer differently.

    Both are asked the facts of a file, or of their ledgers, and control prompts, plain and in a
    chat if the tokenizer has a template.
    """

    one: One
    """name or folder of a model"""
    two: Two
    """name or folder of the other"""
    facts: str | None = None
    """file of facts, whose prompts and paraphrases are asked; by default those of the ledgers"""

    def run(self) -> None:
        """Asks and prints."""
        from hiedit_benchmarks.commands import diff

        print(diff.diff(self.one, self.two, self.facts))
