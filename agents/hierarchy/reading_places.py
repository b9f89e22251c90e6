"""At which tokens of a prompt a neuron reads, and at which it must not fire."""

from __future__ import annotations

from dataclasses import replace

from hiedit_env.model.tokenization import EncodedPrompt

#: How many tokens behind a subject are looked at.
NEXT = 8


def subject_ids(prompt: EncodedPrompt) -> tuple[int, ...]:
    """The tokens of the subject's last mention; none where the prompt has no subject."""
    if prompt.subject_missing or not prompt.subject_spans:
        return ()
    start, stop = prompt.subject_spans[-1]
    return prompt.prompt_ids[start:stop]


def behind(prompt: EncodedPrompt) -> list[int]:
    """Places behind the subject where a prompt can be read: the next ones, and its end.

    None is the first token of the text.
    """
    end = len(prompt.prompt_ids) - 1
    if prompt.subject_missing or not prompt.subject_spans:
        return [end] if end else []
    stop = prompt.subject_spans[-1][1]
    return [*range(stop, min(stop + NEXT, end)), *([end] if end else [])]


def up_to_subject(prompt: EncodedPrompt) -> EncodedPrompt:
    """The prompt as it is read at its subject's last token."""
    ids = prompt.prompt_ids[: prompt.subject_spans[-1][1]]
    return replace(prompt, prompt_ids=ids, answer_ids=ids[-1:])


def elsewhere(prompt: EncodedPrompt, place: int | None) -> list[int]:
    """Positions that a neuron must not fire at.

    Above all not at a text's first token: all others attend to it, so what is added there is added
    to everything.
    """
    if place is not None:
        return [i for i in range(prompt.length) if i != place]
    mentions = {stop - 1 for _, stop in prompt.subject_spans}
    here = prompt.positions("subject")[0]
    return [i for i in range(prompt.length) if i != here and i not in mentions]
