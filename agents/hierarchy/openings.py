"""Words in front of a prompt: a fact is the same whatever was said before."""

from __future__ import annotations

from hiedit_env.errors import PromptError
from hiedit_env.model.asking import has_markers
from hiedit_env.model.tokenization import EncodedPrompt
from hiedit_env.resident.resident import ResidentLLM

#: Texts that a prompt is read behind, in the order in which they are used.
OPENINGS = (
    "Many people know this. ",
    "It was raining that day. ",
    "The meeting ended at noon.\n",
    "Here is something that I read yesterday in a book. ",
)


def behind(
    llm: ResidentLLM, opening: str, prompt: EncodedPrompt, at: int
) -> list[tuple[EncodedPrompt, int]]:
    """A plain prompt behind other words, and where its token ``at`` stands there.

    Args:
        llm: The model.
        opening: The words, with the white space behind them.
        prompt: The prompt.
        at: A position in its ``prompt_ids``.

    Returns:
        One pair; nothing for a prompt in chat form, for one that would be too long, and where the
        tokens from ``at`` on would change.
    """
    if has_markers(llm.tokenizer, prompt.prompt):
        return []
    try:
        longer = llm.encode(opening + prompt.prompt, prompt.answer)
    except PromptError:  # too long
        return []
    place = at + len(longer.prompt_ids) - len(prompt.prompt_ids)
    same = longer.prompt_ids[place:] == prompt.prompt_ids[at:]
    return [(longer, place)] if same and longer.answer_ids == prompt.answer_ids else []
