"""Control prompts, which no file of facts is about, and agreement with the unedited model on them.

*Agreement* is the share of the unedited model's own greedy answer tokens (at most 5) that are still
the argmax, mean over prompts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from hiedit_env.errors import PromptError, SettingsError
from hiedit_env.evaluation.unedited import UneditedModel
from hiedit_env.model.asking import end_of_turn
from hiedit_env.model.built_in import built_in
from hiedit_env.model.relatives import known_as
from hiedit_env.model.tokenization import EncodedPrompt
from hiedit_env.resident.resident import ResidentLLM
from hiedit_env.resident.shared_beginning import alike, logits_alike

#: Prompts that no file of facts is about.
CONTROL = (
    "The capital of France is",
    "Water is made of hydrogen and",
    "The opposite of hot is",
    "Two plus two equals",
    "The sun rises in the",
    "A week has seven",
    "Once upon a time, there was a",
    "In order to bake bread, you need",
    "The first month of the year is",
    "Dogs and cats are kept as",
    "She opened the door and",
    "The largest planet of the solar system is",
)
#: The same as messages of a user.
CONTROL_CHAT = (
    "What is the capital of France?",
    "What is water made of?",
    "What is the opposite of hot?",
    "What is two plus two?",
    "Name three animals.",
    "How do I bake bread?",
    "Write a short sentence about the sea.",
    "What is the first month of the year?",
)


class Controls:
    """The control prompts that a model can be asked, with the unedited model's own answers.

    Args:
        llm: The model, edited or not; nothing is run before the first question.
    """

    def __init__(self, llm: ResidentLLM) -> None:
        self._llm = llm
        self._references: list[EncodedPrompt] | None = None

    @property
    def references(self) -> list[EncodedPrompt]:
        """The prompts; those in the chat form only where the tokenizer has a chat template."""
        if self._references is None:
            encoder = self._llm.encoder
            asked: list[EncodedPrompt] = []
            for texts, encode in (
                (CONTROL, encoder.encode),
                (CONTROL_CHAT if has_template(self._llm.tokenizer) else (), encoder.encode_chat),
            ):
                for text in texts:
                    try:
                        asked.append(encode(text, "x"))
                    except PromptError:  # longer than a toy's context, or refused by a template
                        continue
            self._references = UneditedModel(self._llm).answers(asked) if asked else []
        return self._references

    def agreement(self) -> float | None:
        """Mean agreement of the present weights, from 0 to 1; None where nothing can be asked."""
        if not self.references:
            return None
        return agreement_with(self._llm, self.references, asked_often=True)


def has_template(tokenizer: object) -> bool:
    """Whether a tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def end_id(tokenizer: PreTrainedTokenizerBase, name: str, end_token: bool | None) -> int | None:
    """The token that is put behind every answer; None for none.

    Args:
        tokenizer: The model's tokenizer.
        name: The model's name.
        end_token: Whether there is one; None for yes, except for the toy models and where the
            tokenizer has none.

    Raises:
        SettingsError: it is asked for, and the tokenizer has none.
    """
    found = end_of_turn(tokenizer)
    if end_token is None:
        end_token = found is not None and not built_in(known_as(name)).shipped
    if end_token and found is None:
        raise SettingsError("end_token=True needs an end token, and the tokenizer has none")
    return found if end_token else None


@torch.inference_mode()
def agreement_with(
    llm: ResidentLLM, references: Sequence[EncodedPrompt], *, asked_often: bool = False
) -> float:
    """Share of given answer tokens that are the argmax, mean over prompts.

    Args:
        llm: The model at its present weights.
        references: Prompts with the answers that are compared with; at least one.
        asked_often: As for :func:`right_tokens`.
    """
    right = right_tokens(llm, references, asked_often=asked_often)
    shares = [float(part.float().mean()) for part in right]
    return sum(shares) / len(shares)


@torch.inference_mode()
def right_tokens(
    llm: ResidentLLM, prompts: Sequence[EncodedPrompt], *, asked_often: bool = False
) -> list[torch.Tensor]:
    """Per prompt and answer token whether it is the argmax under teacher forcing; bool.

    Args:
        llm: The model at its present weights.
        prompts: Prompts with the answers that are looked for.
        asked_often: Whether the same prompts are asked many times. Then what the blocks below all
            edits give is remembered for each of them, and the others run a beginning that prompts
            share, such as a chat template's, once (:mod:`hiedit_env.resident.shared_beginning`).
    """
    found: list[torch.Tensor] = [torch.empty(0)] * len(prompts)
    for common, group in alike(prompts) if asked_often else [(0, list(range(len(prompts))))]:
        for bucket in llm.buckets([prompts[i] for i in group]):
            places = [group[i] for i in bucket]
            some = [prompts[i] for i in places]
            batch = llm.batch(some)
            if asked_often:
                logits = logits_alike(llm, batch, common)
            else:
                logits = llm.answer_logits(batch, remember=False)
            right = (logits.argmax(-1) == batch.labels).cpu()
            sizes = [len(prompt.answer_ids) for prompt in some]
            for i, part in zip(places, torch.split(right, sizes), strict=True):
                found[i] = part
    return found
