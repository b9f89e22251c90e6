"""The folder of an edited model: written beside its place, put there whole, loaded again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hiedit_agents.editing.ledger import Ledger
from hiedit_agents.editing.out_folder import OutFolder as WholeFolder
from hiedit_benchmarks.commands.edit_history import FILE
from hiedit_benchmarks.comparison.results import write_json
from hiedit_benchmarks.comparison.settings import CompareSettings
from hiedit_env.datasets.requests import Request
from hiedit_env.errors import HieditError
from hiedit_env.model.architectures import find_candidates
from hiedit_env.model.folders import DTYPES
from hiedit_env.model.loading import load_model
from hiedit_env.model.saving import EditedMatrix, difference, differences, save_edited
from hiedit_env.resident.resident import ResidentLLM

#: Facts on which logits are compared.
_COMPARED = 20
_LISTED = 5


@dataclass(frozen=True, slots=True)
class Reloaded:
    """What loading a saved model again showed.

    Args:
        llm: The model as loaded; None where it could not be.
        dtype: The dtype it was loaded in, that of its files.
        unverified: Why it could not be loaded; None where it was.
        differences: One line per thing that is not what it should be; none where all is well.
        logits: Largest difference of logits from those of the edited model, where both have one
            dtype.
    """

    llm: ResidentLLM | None
    dtype: str
    unverified: str | None
    differences: tuple[str, ...]
    logits: float | None

    @property
    def text(self) -> str:
        """The end of a sentence that begins with "Saved to …;"."""
        if self.differences:
            return f"but not verified: {self.differences[0]}."
        if self.unverified is not None:
            return (
                "not verified: its files are right bit for bit, but it could not be loaded beside "
                "the edited model."
            )
        if self.logits is None:
            return (
                f"loaded again from there, its weights are identical bit for bit in {self.dtype}, "
                "the dtype of its files."
            )
        if self.logits == 0:
            return "loaded again from there, its weights and logits are identical bit for bit."
        return (
            "loaded again from there, its weights are identical bit for bit; its logits differ by "
            f"up to {self.logits:.2g}, since the edited model is run in two halves."
        )

    def to_json(self) -> dict[str, Any]:
        """For ``edits.json``."""
        return {
            "dtype": self.dtype,
            "unverified": self.unverified,
            "differences": list(self.differences),
            "largest_logit_difference": self.logits,
        }


class OutFolder(WholeFolder):
    """The folder of an edited model, which appears whole or not at all."""

    def __init__(self, out: Path) -> None:
        super().__init__(out)
        #: The folder as it was named, which may be a link.
        self.given = out

    def save(
        self,
        source: Path,
        matrices: Sequence[EditedMatrix],
        record: Mapping[str, Any],
        ledger: Ledger | None,
    ) -> list[str]:
        """Writes the model beside ``out`` and moves it there, see :meth:`fill`.

        Args:
            source: The unedited model's folder.
            matrices: What was edited.
            record: ``edits.json``.
            ledger: Is copied into the folder.

        Returns:
            Files of the unedited model that were left out.
        """

        def write(folder: Path) -> list[str]:
            left_out = save_edited(source, folder, matrices)
            write_json(folder / FILE, record)
            if ledger is not None:
                ledger.copy_to(folder)
            return left_out

        return self.fill(write)


def reload(
    out: Path,
    source: Path,
    llm: ResidentLLM,
    matrices: Sequence[EditedMatrix],
    settings: CompareSettings,
    requests: Sequence[Request],
) -> Reloaded:
    """Compares the saved files, then loads the folder as anybody would and compares the model.

    Args:
        out: The saved model.
        source: The unedited model's folder.
        llm: The edited model.
        matrices: What was edited.
        settings: Where to load it.
        requests: Whose prompts are read with both.
    """
    lines = differences(source, out, matrices)
    dtype = _dtype(matrices, llm)
    try:
        loaded = load_model(
            str(out),
            device=settings.device,
            dtype=dtype,
            trust_remote_code=settings.trust_remote_code,
            progress=False,
            layers=list(llm.names),
            memory=settings.memory_check,
        )
        lines += _compare(llm, loaded.model, matrices)
        again = ResidentLLM(
            loaded.model, loaded.tokenizer, find_candidates(loaded.model, list(llm.names), str(out))
        )
        logits = None
        if again.dtype == llm.dtype:
            logits = _logits_gap(llm, again, requests[:_COMPARED])
        for request in requests[:_COMPARED]:
            if again.encoder.encode_prompt(request.prompt) != llm.encoder.encode_prompt(
                request.prompt
            ):
                lines.append(f"the saved tokenizer reads {request.prompt!r} as other tokens")
                break
    # Above all memory: there are two models now. PyTorch says so with a RuntimeError.
    except (HieditError, RuntimeError, MemoryError, OSError, ImportError, ValueError) as error:
        return Reloaded(None, dtype, f"{type(error).__name__}: {error}", tuple(lines), None)
    return Reloaded(again, dtype, None, tuple(lines), logits)


def _dtype(matrices: Sequence[EditedMatrix], llm: ResidentLLM) -> str:
    """The dtype of the files, in which ``from_pretrained`` loads a model by itself."""
    stored = [DTYPES[place.dtype] for matrix in matrices for place in matrix.places]
    name = str(stored[0] if stored else llm.dtype).removeprefix("torch.")
    return name if name in ("float32", "bfloat16", "float16") else "float32"


def _compare(llm: ResidentLLM, model: Any, matrices: Sequence[EditedMatrix]) -> Iterable[str]:
    """Lines about parameters of a loaded model that are not those of the edited one."""
    edited = {matrix.name: matrix for matrix in matrices}
    mine, others = dict(llm.model.named_parameters()), dict(model.named_parameters())
    lines = [f"the saved model has no parameter {name!r}" for name in mine.keys() - others.keys()]
    lines += [f"the saved model has a parameter {name!r}" for name in others.keys() - mine.keys()]
    for name in mine.keys() & others.keys():
        expected, found = mine[name].detach(), others[name].detach()
        if name in edited:
            place = edited[name].places[0]
            expected = edited[name].stored(place, place.read())
        if expected.shape != found.shape:
            lines.append(f"parameter {name!r} has shape {tuple(found.shape)} in the saved model")
            continue
        # Loading in a wider dtype changes nothing, in a narrower one it rounds both alike. A folder
        # may store some parameters in a wider dtype than the one that all are loaded in again.
        narrow = min(expected.dtype, found.dtype, key=lambda kind: kind.itemsize)
        gap = difference(expected.to(narrow).cpu(), found.to(narrow).cpu())
        if gap is not None:
            lines.append(f"parameter {name!r} differs by up to {gap:.3g} in the saved model")
    lines.sort()
    more = len(lines) - _LISTED
    return [*lines[:_LISTED], *([f"… and {more} more"] if more > 0 else [])]


@torch.inference_mode()
def _logits_gap(llm: ResidentLLM, again: ResidentLLM, requests: Sequence[Request]) -> float:
    """The largest absolute difference of logits of two models, each run as a whole."""
    gap = 0.0
    for request in requests:
        ids = torch.tensor([llm.encode(request.prompt, request.answer).input_ids]).to(llm.device)
        one, two = _logits(llm.model, ids), _logits(again.model, ids)
        if not torch.equal(one, two):
            gap = max(gap, float((one.double() - two.double()).abs().max()))
    return gap


def _logits(model: Any, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits
