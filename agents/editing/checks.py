"""What an edit must not do: its checks, and what a fact is asked before and after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hiedit_agents.editing.controls import Controls, right_tokens
from hiedit_env.datasets.requests import Request
from hiedit_env.errors import PromptError, SettingsError, shown, whole_number
from hiedit_env.evaluation.matching import EXTRA_TOKENS, starts_with
from hiedit_env.model.asking import PromptForm, has_markers
from hiedit_env.model.tokenization import EncodedPrompt
from hiedit_env.resident.resident import ResidentLLM
from hiedit_env.resident.weights import same_version


@dataclass(frozen=True, slots=True)
class Checks:
    """What must hold right after an edit; otherwise it is rolled back.

    Args:
        target: Whether the greedy continuation must begin with the answer, in every form asked.
        min_agreement: Least share of the unedited model's own answer tokens to the control prompts
            that must be left, from 0 to 1; None to leave it out.
        earlier: Number of earlier facts that are asked again, the latest ones and an even sample
            of the others; 0 to leave it out.
        max_lost: Largest share of those answered before this edit that it may break.
        roll_back: If False, an edit that fails is kept and reported. One that makes the model's
            numbers infinite is rolled back in any case.

    Raises:
        SettingsError: a share outside 0 to 1, a negative number, or a word for yes or no.
    """

    target: bool = True
    min_agreement: float | None = 0.6
    earlier: int = 16
    max_lost: float = 0.25
    roll_back: bool = True

    def __post_init__(self) -> None:
        whole_number(self.earlier, "earlier", 0)
        for name in ("target", "roll_back"):
            if not isinstance(getattr(self, name), bool):
                raise SettingsError(
                    f"{name} must be True or False, got {shown(getattr(self, name))}"
                )
        for name in ("min_agreement", "max_lost"):
            value = getattr(self, name)
            if value is None and name == "min_agreement":
                continue
            share(value, name)


def share(value: object, name: str) -> float:
    """A setting from 0 to 1.

    Raises:
        SettingsError: another value.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise SettingsError(f"{name} must be a number from 0 to 1, got {shown(value)}")
    return float(value)


@dataclass(frozen=True, slots=True)
class AskedFact:
    """A fact as it is edited and asked.

    Args:
        request: The fact.
        forms: The prompt in every form, as tokens: ``"plain"``, ``"chat"`` or both.
    """

    request: Request
    forms: Mapping[str, EncodedPrompt]

    @property
    def prompts(self) -> tuple[EncodedPrompt, ...]:
        """The forms in order."""
        return tuple(self.forms.values())

    def is_given(self, said: Mapping[str, str]) -> bool:
        """Whether greedy continuations begin with the answer, in every form."""
        return all(starts_with(said[form], self.request.answer) for form in self.forms)


def as_asked(llm: ResidentLLM, request: Request, form: PromptForm) -> AskedFact:
    """A fact in every form it is asked.

    Args:
        llm: Whose tokenizer is used.
        request: The fact; a form of its own goes before ``form``.
        form: The form of facts that have none.

    Raises:
        PromptError: a text that is too long or cannot be tokenised; names the request's source.
    """
    form = request.prompt_form or form
    try:
        found = llm.encoder.encode_forms(request.prompt, request.answer, form, request.system)
        prompts = [llm.encoder.with_subject(p, request.prompt, request.subject) for p in found]
    except PromptError as error:
        raise PromptError(f"{request.source}: {error}") from error
    names: tuple[str, ...] = ("plain", "chat")
    if len(prompts) == 1:
        chat = form == "chat" and not has_markers(llm.tokenizer, request.prompt)
        names = ("chat",) if chat else ("plain",)
    return AskedFact(request, dict(zip(names, prompts, strict=True)))


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the checks of one edit found.

    Args:
        problems: One line per check that failed; none where all hold.
        agreement: On the control prompts; None where it was not measured.
        earlier, kept: Number of earlier facts answered before the edit, and of those after it.
    """

    problems: tuple[str, ...]
    agreement: float | None
    earlier: int
    kept: int


class Examiner:
    """Asks a model.

    The examiner asks the same prompt only once at the same weights: the check after one edit and
    the one before the next have mostly the same prompts. What it remembers ends where anybody
    changes another weight of the model.

    Args:
        llm: The model.
        checks: What must hold.
    """

    def __init__(self, llm: ResidentLLM, checks: Checks) -> None:
        self.llm, self.checks = llm, checks
        self.controls = Controls(llm)
        #: By the candidate weights' fingerprint, the latest last, whether prompts are answered.
        self._known: dict[str, dict[EncodedPrompt, bool]] = {}
        self._others = self._other_weights()

    def say(self, fact: AskedFact) -> dict[str, str]:
        """Greedy continuations in every form, a little longer than the answer."""
        return self.say_all([fact])[0]

    def say_all(self, facts: Sequence[AskedFact]) -> list[dict[str, str]]:
        """The same for several facts."""
        flat = [prompt for fact in facts for prompt in fact.prompts]
        budgets = [len(prompt.answer_ids) + EXTRA_TOKENS for prompt in flat]
        texts = iter(self.llm.generate(flat, budgets))
        return [{form: next(texts) for form in fact.forms} for fact in facts]

    def answered(self, facts: Sequence[AskedFact]) -> list[bool]:
        """Whether every answer token of every form is the argmax, per fact."""
        known = self._at_present()
        flat = dict.fromkeys(prompt for fact in facts for prompt in fact.prompts)
        new = [prompt for prompt in flat if prompt not in known]
        right = right_tokens(self.llm, new, asked_often=True)
        known |= {prompt: bool(part.all()) for prompt, part in zip(new, right, strict=True)}
        return [all(known[prompt] for prompt in fact.prompts) for fact in facts]

    def _at_present(self) -> dict[EncodedPrompt, bool]:
        """What is known of the present weights.

        Two sets of weights are remembered, those before an edit and those after it.
        """
        self._look_at_others()
        now = self.llm.weights_fingerprint()
        found = self._known.pop(now, {})
        self._known = {key: self._known[key] for key in list(self._known)[-1:]} | {now: found}
        return found

    def _look_at_others(self) -> None:
        """Forgets everything where weights that no edit changes are not what they were."""
        others = self._other_weights()
        if not same_version(others, self._others):
            self._known, self._others = {}, others
            self.llm.cache.clear()

    def _other_weights(self) -> tuple[object, ...]:
        """Differs where a weight of the model differs that is no candidate."""
        edited = {id(layer.module.weight) for layer in self.llm.layers}
        model = self.llm.model
        tensors = [t for t in (*model.parameters(), *model.buffers()) if id(t) not in edited]
        return tuple(
            number
            for tensor in tensors
            for number in (tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version)
        )

    def held(self, earlier: Sequence[AskedFact]) -> list[AskedFact]:
        """Those of some earlier facts that the model answers now, a sample of all.

        Args:
            earlier: All earlier facts, earliest first.
        """
        chosen = sample(earlier, self.checks.earlier)
        return [f for f, right in zip(chosen, self.answered(chosen), strict=True) if right]

    def missed(self, fact: AskedFact, said: Mapping[str, str]) -> tuple[str, ...]:
        """Whether a fact that was just written is not given: one line, or none.

        Args:
            fact: The fact.
            said: What the model says now.
        """
        if not self.checks.target or fact.is_given(said):
            return ()
        wrong = [
            f"{form}: {' '.join(text.split())!r:.60}"
            for form, text in said.items()
            if not starts_with(text, fact.request.answer)
        ]
        return (f"the answer is not given ({'; '.join(wrong)})",)

    def judge(self, held: Sequence[AskedFact]) -> Verdict:
        """Checks what an edit that was just written has done to everything else.

        Args:
            held: Earlier facts that the model answered before the edit.
        """
        checks, problems = self.checks, []
        agreement = None
        if checks.min_agreement is not None:
            self._look_at_others()
            agreement = self.controls.agreement()
            if agreement is not None and agreement < checks.min_agreement:
                problems.append(
                    f"agreement with the unedited model on control prompts is {agreement:.2f}, "
                    f"under {checks.min_agreement:.2f}"
                )
        kept = sum(self.answered(held))
        if len(held) - kept > checks.max_lost * len(held):
            problems.append(f"{len(held) - kept} of {len(held)} earlier facts asked are lost")
        return Verdict(tuple(problems), agreement, len(held), kept)


def sample(facts: Sequence[AskedFact], count: int) -> list[AskedFact]:
    """At most so many: half of them the latest, the others evenly spaced among the rest.

    >>> sample(range(100), 4)  # type: ignore[arg-type]
    [0, 49, 98, 99]
    """
    if len(facts) <= count:
        return list(facts)
    latest = (count + 1) // 2
    rest, few = len(facts) - latest, count - latest
    return [facts[i * rest // few] for i in range(few)] + list(facts[rest:])
