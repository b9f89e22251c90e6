"""At which tokens of a prompt a neuron reads, and at which it must not fire."""

from __future__ import annotations

from collections.abc import Sequence
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


def beginnings(
    sentences: Sequence[EncodedPrompt], known: Sequence[EncodedPrompt]
) -> list[EncodedPrompt]:
    """Sentences up to their subjects, each once, without those that known prompts begin with.

    What begins alike is read alike at the subject.
    """
    found = {(begin := up_to_subject(one)).prompt_ids: begin for one in sentences}
    for prompt in known if found else ():
        found.pop(up_to_subject(prompt).prompt_ids, None)
    return list(found.values())


def where_met(
    last: Sequence[int], facts: Sequence[Sequence[EncodedPrompt]], most: int
) -> tuple[EncodedPrompt, ...]:
    """Where some facts' prompts and answers have a subject's last token, behind a text's first.

    Args:
        last: The token; none for a prompt without a subject, which is met nowhere.
        facts: Each with its prompts, the latest last.
        most: Number of places; those in the latest facts are taken.

    Returns:
        The texts up to these tokens, each once, those of the latest fact last.
    """
    found: dict[tuple[int, ...], EncodedPrompt] = {}
    for prompt in (prompt for fact in reversed(facts) for prompt in fact):
        ids = prompt.input_ids
        if len(found) >= most or not last:
            break
        for end in range(2, len(ids) + 1):
            if ids[end - 1] == last[0]:
                cut = replace(
                    prompt, prompt_ids=ids[:end], answer_ids=ids[end - 1 : end], subject_spans=()
                )
                found.setdefault(cut.prompt_ids, cut)
    return tuple(found.values())[:most][::-1]


def elsewhere(prompt: EncodedPrompt, place: int | None) -> list[int]:
    """Positions that a neuron must not fire at, which reads at ``place`` or at the last mention.

    Above all not at a text's first token: all others attend to it, so what is added there is added
    to everything.
    """
    if place is not None:
        return [i for i in range(prompt.length) if i != place]
    ids, here = prompt.prompt_ids, prompt.positions("subject")[0]
    left_out = {here}
    for start, stop in prompt.subject_spans:
        # A name may hold its last token twice, as "Joyce Quin, Baroness Quin" does.
        left_out |= {i for i in range(start, stop) if i == stop - 1 or ids[i] == ids[here]}
    left_out.discard(0)
    return [i for i in range(prompt.length) if i not in left_out]
