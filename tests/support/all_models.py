"""Every causal-LM class of the installed transformers, from a folder through an edit and back.

As a script it writes the table of docs/add-a-model.md: ``python -m tests.support.all_models``.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.utils import logging as hf_logging

from hiedit_env.errors import HieditError
from hiedit_env.model.architectures import find_candidates
from hiedit_env.model.loading import load_model
from hiedit_env.model.memory_budget import auto_class
from hiedit_env.resident.resident import ResidentLLM
from tests.support.models import PROMPTS, all_bits, random_updates, tokenizer
from tests.support.tiny_models import BLOCKS, MODEL_TYPES, NOT_BUILT, tiny_model

PAGE = Path(__file__).parents[2] / "docs" / "add-a-model.md"
START, END = "<!-- models: start -->", "<!-- models: end -->"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one model type.

    Args:
        model_type: ``config.model_type``.
        name: Name of the model's class.
        matrices: Default candidates, ``{}`` for the number of the block; empty if refused.
        way: How it is run, or why it is refused.
    """

    model_type: str
    name: str
    matrices: tuple[str, ...]
    way: str

    def row(self) -> str:
        """A row of the page's table."""
        matrices = ", ".join(f"`{matrix}`" for matrix in self.matrices) or "refused"
        return f"| `{self.model_type}` | {matrices} | {self.way} |"


def align(model: PreTrainedModel) -> None:
    """Moves the weights of a loaded model to addresses like those of a built one.

    In a mapped file they stand at any address, where some processors add up in another order.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def own_logits(model: PreTrainedModel) -> Tensor:
    """The model's own logits at the answer positions of ``PROMPTS``, each prompt alone."""
    with torch.no_grad():
        return torch.cat(
            [
                model(input_ids=torch.tensor([p.input_ids]), use_cache=False).logits[
                    0, len(p.prompt_ids) - 1 :
                ]
                for p in PROMPTS
            ]
        ).float()


def assert_close(ours: Tensor, own: Tensor, tolerance: float = 1e-5) -> None:
    """Within a tolerance relative to the largest number."""
    error = float((ours - own).abs().max() / own.abs().max())
    assert error <= tolerance, f"relative error {error:.2g}"


def go_through(model_type: str, folder: Path) -> Outcome:
    """Builds, saves, loads, captures, edits, restores and saves one tiny model, or is refused.

    Raises:
        AssertionError: a number is not what the model's own code gives.
    """
    model = tiny_model(model_type)
    name = type(model).__name__
    model.save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    try:
        loaded = load_model(str(folder / "model"), progress=False)
        align(loaded.model)
        llm = ResidentLLM(loaded.model, loaded.tokenizer, find_candidates(loaded.model))
    except HieditError as error:
        return Outcome(model_type, name, (), _reason(str(error).replace(str(folder), "…")))
    assert type(llm.model) is type(model)
    unedited, own = all_bits(llm.model), own_logits(llm.model)
    assert_close(own, own_logits(model), 1e-6)
    batch = llm.batch(PROMPTS)
    assert_close(llm.answer_logits(batch).float(), own)
    assert_gradients(llm, model)

    before = llm.commit(random_updates(llm, scale=0.1))
    edited = own_logits(llm.model)
    assert float((edited - own).abs().max()) > 1e-4 * float(own.abs().max())
    assert_close(llm.answer_logits(batch).float(), edited)
    llm.model.save_pretrained(folder / "edited")
    again = auto_class(llm.model.config).from_pretrained(folder / "edited").eval()
    align(again)
    assert all_bits(again) == all_bits(llm.model)
    assert_close(own_logits(again), edited, 1e-6)
    llm.restore(before)
    assert all_bits(llm.model) == unedited

    matrices = dict.fromkeys(
        ".".join("{}" if part == str(layer.block) else part for part in layer.name.split("."))
        for layer in llm.layers
    )
    notes = [note.partition(": ")[2] for note in llm.notes]
    return Outcome(model_type, name, tuple(matrices), "; ".join(notes))


def assert_gradients(llm: ResidentLLM, model: PreTrainedModel) -> None:
    """Keys and value gradients against the weight gradient of the whole model, by autograd."""
    prompt = PROMPTS[2]
    capture = llm.read(prompt).capture()
    weight = model.get_submodule(llm.names[0]).weight.requires_grad_(True)
    logits = model(input_ids=torch.tensor([prompt.input_ids]), use_cache=False).logits[0]
    answers = logits[len(prompt.prompt_ids) - 1 :].float()
    F.cross_entropy(answers, torch.tensor(prompt.answer_ids)).backward()
    gradient = weight.grad.mT if llm.layers[0].is_transposed else weight.grad
    assert_close(capture.keys[0].mT @ capture.value_gradients[0], gradient, 1e-4)


def _reason(message: str) -> str:
    """An error as one cell of the table."""
    assert "\n" not in message
    return message.partition(";")[0].replace("|", "/")


def row_not_built(model_type: str) -> str:
    """The row of a model type of which no model can be made here."""
    return f"| `{model_type}` | not tried | {NOT_BUILT[model_type]} |"


def table(outcomes: Sequence[Outcome]) -> str:
    """The table between the markers of the page: every model type, tried or not."""
    edited = sum(bool(outcome.matrices) for outcome in outcomes)
    rows = {outcome.model_type: outcome.row() for outcome in outcomes}
    rows |= {model_type: row_not_built(model_type) for model_type in NOT_BUILT}
    lines = [
        f"{len(rows)} model types of the installed transformers have a causal language model. "
        f"{len(outcomes)} were tried as random models of {BLOCKS} blocks; {edited} can be edited "
        f"by default, {len(outcomes) - edited} are refused. Of {len(NOT_BUILT)} no model can be "
        "made here.",
        "",
        "| model type | default layers | how it is run, if in another way; why not |",
        "| --- | --- | --- |",
        *(rows[model_type] for model_type in MODEL_TYPES if model_type in rows),
    ]
    return "\n".join(lines)


def written() -> str:
    """What stands between the markers of the page now."""
    return PAGE.read_text("utf-8").partition(START)[2].partition(END)[0].strip()


def main() -> None:
    """Writes the table into the page."""
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    outcomes = []
    for model_type in MODEL_TYPES:
        if model_type in NOT_BUILT:
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                outcomes.append(go_through(model_type, Path(folder)))
            except Exception as error:
                print(f"{model_type}: {type(error).__name__}: {error}", file=sys.stderr)
    text = PAGE.read_text("utf-8")
    before, _, rest = text.partition(START)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{START}\n\n{table(outcomes)}\n\n{END}{after}", "utf-8")


if __name__ == "__main__":
    main()
