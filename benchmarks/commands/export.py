"""The edits of a ledger for other programs: ``hiedit export``."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hiedit_agents.editing.checks import Checks
from hiedit_agents.editing.editor import Editor
from hiedit_agents.editing.ledger import Ledger
from hiedit_agents.editing.ledger_format import require_finished
from hiedit_agents.editing.stored import base_folder
from hiedit_env.errors import LayerError, LedgerError, ResultsExistError


@contextmanager
def opened(place: Path, base: Path | None) -> Iterator[Editor]:
    """Opens an editor whose model holds the edits of a ledger.

    It has a copy of the ledger, so the folder is only read.

    Args:
        place: A folder with a ledger.
        base: Folder of the unedited model; None for where the ledger says.

    Raises:
        LedgerError: no ledger, a damaged one, or one of another model than the base.
        ModelError: the unedited model cannot be loaded.
    """
    require_finished(place)
    if base is not None and Ledger.is_in(Path(base)):
        raise LedgerError(
            f"{base} is an edited model, which has a ledger of its own; give the unedited model "
            "with --base"
        )
    with Ledger.open(place) as ledger, tempfile.TemporaryDirectory() as work:
        source = base_folder(ledger.base, place) if base is None else base
        ledger.copy_to(Path(work))
        try:
            editor = Editor.from_pretrained(
                source,
                dtype=ledger.base.dtype,
                layers=[layer.name for layer in ledger.base.layers],
                # Nothing is edited, so any agent will do.
                agent="all-layers",
                checks=Checks(min_agreement=None, earlier=0),
                ledger=work,
            )
        except LayerError as error:
            raise LedgerError(
                f"{source} is not the model that the ledger in {place} was begun with "
                f"({ledger.base.model!r}); give that one with --base ({error})"
            ) from error
        with editor:
            yield editor


def folder(editor: Editor, out: Path) -> str:
    """Writes an ordinary Hugging Face folder with the ledger."""
    saved = editor.save(out)
    text = f"{out}: {saved.measured.text}"
    if saved.left_out:
        text += f"\nnot copied, since they hold the unedited weights: {', '.join(saved.left_out)}"
    return text


def adapter(editor: Editor, out: Path, max_rank: int | None, allow_loss: bool) -> str:
    """Writes a LoRA adapter."""
    report = editor.save_adapter(out, max_rank=max_rank, allow_loss=allow_loss)
    return f"{out}: {report.text}"


def delta(editor: Editor, out: Path) -> str:
    """Writes the edited matrices alone."""
    _refuse_old(out)
    editor.save_delta(out)
    return f"{out}: {_size(out)}; hiedit_agents.apply_delta puts the edits into the model"


def gguf(editor: Editor, out: Path, type: str) -> str:
    """Writes a GGUF file of the whole edited model."""
    from hiedit_agents.editing.gguf_file import write_gguf

    write_gguf(editor.model, editor.tokenizer, out, type, editor.name)  # type: ignore[arg-type]
    edits = len(editor.ledger.active)
    return f"{out}: {_size(out)}, {type}, with {edits} edits"


def _refuse_old(out: Path) -> None:
    if out.exists():
        raise ResultsExistError(f"{out} exists; give another --out")


def _size(path: Path) -> str:
    return f"{path.stat().st_size / 1e6:.3g} MB"
