"""What an evaluation asks about each fact: the prompts of every metric, as tokens, form by form."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from hiedit_env.datasets.requests import NEIGHBOUR, Probe, Request
from hiedit_env.datasets.writing import mentions
from hiedit_env.errors import PromptError, SettingsError
from hiedit_env.evaluation.names import AskedForm, Metric, metric_in, portability_of
from hiedit_env.model.asking import chat_text, has_markers
from hiedit_env.model.tokenization import EncodedPrompt
from hiedit_env.resident.resident import ResidentLLM

FORMS: tuple[AskedForm, ...] = ("plain", "chat")


@dataclass(slots=True)
class Group:
    """The prompts of one metric in one form.

    Args:
        metric: The metric of the data that it belongs to: neighbours belong to specificity.
        facts: Per fact its prompts; none where the fact has nothing to measure.
    """

    metric: Metric
    facts: list[tuple[EncodedPrompt, ...]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Questions:
    """All that is asked about a stream.

    Args:
        groups: Name of a metric, with its form → its prompts.
        aliases: Other right answers of a prompt, by prompt.
    """

    groups: dict[str, Group]
    aliases: dict[EncodedPrompt, tuple[str, ...]]

    def prompts(self, names: Collection[str] | None = None) -> list[EncodedPrompt]:
        """The prompts of some groups, of all by default; some may come several times."""
        chosen = self.groups if names is None else names
        return [p for name in chosen for fact in self.groups[name].facts for p in fact]


def questions_about(
    llm: ResidentLLM, requests: Sequence[Request], forms: Sequence[AskedForm]
) -> Questions:
    """The prompts of every metric.

    A request whose prompt a chat template has written already is asked as it is in the plain form,
    and has nothing to measure in the chat form. Groups of portability and of neighbours are there
    only where the data has such prompts.

    Args:
        llm: Whose tokenizer is used.
        requests: F facts.
        forms: At least one.

    Raises:
        SettingsError: an unknown form, or none.
        PromptError: a text that is empty or too long, which names the request's source; or the chat
            form of a tokenizer without a template.
    """
    unknown = [form for form in forms if form not in FORMS]
    if unknown or not forms:
        known = ", ".join(FORMS)
        raise SettingsError(f"forms must be some of {known}, at least one, got {list(forms)}")
    if "chat" in forms:
        chat_text(llm.tokenizer, "Hello")  # refuses a tokenizer without a template
    found = Questions({}, {})
    ported = [portability_probes(request) for request in requests]
    for form in dict.fromkeys(forms):
        _ask(llm, requests, ported, form, found)
    return found


def portability_probes(request: Request) -> tuple[Probe, ...]:
    """The portability prompts of a fact: the data's, and its own prompt under other names.

    A prompt under a name that the data asks anyway is not added.

    >>> fact = Request("Rome is in", "Peru", "Rome", subject_aliases=("Roma", "the city"))
    >>> [probe.prompt for probe in portability_probes(fact)]
    ['Roma is in', 'the city is in']
    """
    asked = {probe.prompt for probe in request.portability}
    places = mentions(request.prompt, request.subject)
    under_names: dict[str, Probe] = {}
    for name in request.subject_aliases if places and request.subject != request.prompt else ():
        text, start = "", 0
        for a, b in places:
            text, start = text + request.prompt[start:a] + name, b
        text += request.prompt[start:]
        if text not in asked:
            under_names[text] = Probe(text, request.answer, "alias")
    return (*request.portability, *under_names.values())


def is_neighbour(request: Request, probe: Probe) -> bool:
    """Whether an unrelated prompt asks the same about another subject.

    So it does where the data says so, and where it is the fact's own sentence with something else
    in the subject's place.

    >>> fact = Request("Rome is in", "Peru", "Rome")
    >>> [is_neighbour(fact, Probe(text, "x")) for text in ("Oslo is in", "Cats eat")]
    [True, False]
    """
    if probe.kind == NEIGHBOUR:
        return True
    for start, end in mentions(request.prompt, request.subject):
        before, after = request.prompt[:start], request.prompt[end:]
        other = probe.prompt[len(before) : len(probe.prompt) - len(after)]
        if (
            (before.strip() or after.strip())
            and other.strip()
            and probe.prompt == before + other + after
            and request.subject.casefold() not in other.casefold()
        ):
            return True
    return False


# -- inside ---------------------------------------------------------------------------------------


def _ask(
    llm: ResidentLLM,
    requests: Sequence[Request],
    ported: Sequence[Sequence[Probe]],
    form: AskedForm,
    found: Questions,
) -> None:
    """Adds the groups of one form."""
    names: dict[str, Metric] = {
        "efficacy": "efficacy",
        "generalization": "generalization",
        "specificity": "specificity",
    }
    near = [[is_neighbour(request, probe) for probe in request.locality] for request in requests]
    flat = [flag for flags in near for flag in flags]
    if any(flat):
        names["neighbours"] = "specificity"
        if not all(flat):
            names["unrelated"] = "specificity"
    kinds = dict.fromkeys(probe.kind for probes in ported for probe in probes)
    if kinds:
        names["portability"] = "portability"
        names |= dict.fromkeys(map(portability_of, kinds), "portability")
    groups = {name: Group(metric) for name, metric in names.items()}
    for request, probes, flags in zip(requests, ported, near, strict=True):
        asked = _fact(llm, request, probes, flags, form, found.aliases)
        for name, group in groups.items():
            group.facts.append(tuple(asked.get(name, ())))
    found.groups.update({metric_in(form, name): group for name, group in groups.items()})


def _fact(
    llm: ResidentLLM,
    request: Request,
    ported: Sequence[Probe],
    near: Sequence[bool],
    form: AskedForm,
    aliases: dict[EncodedPrompt, tuple[str, ...]],
) -> dict[str, list[EncodedPrompt]]:
    """Name of a group without its form → prompts of one fact."""

    def encode(prompt: str, answer: str) -> list[EncodedPrompt]:
        if form == "plain":
            return [llm.encode(prompt, answer)]
        if has_markers(llm.tokenizer, prompt):
            return []
        return [llm.encoder.encode_chat(prompt, answer, request.system)]

    try:
        asked = {
            "efficacy": encode(request.prompt, request.answer),
            "generalization": [
                p for text in request.paraphrases for p in encode(text, request.answer)
            ],
            "specificity": [],
            "neighbours": [],
            "unrelated": [],
            "portability": [],
        }
        for probe, is_near in zip(request.locality, near, strict=True):
            found = encode(probe.prompt, probe.answer)
            asked["specificity"] += found
            asked["neighbours" if is_near else "unrelated"] += found
        for probe in ported:
            found = encode(probe.prompt, probe.answer)
            asked["portability"] += found
            asked.setdefault(portability_of(probe.kind), []).extend(found)
            for p in found if probe.aliases else ():
                aliases[p] = tuple(dict.fromkeys((*aliases.get(p, ()), *probe.aliases)))
    except PromptError as error:
        raise PromptError(f"{request.source}: {error}") from error
    return asked
