"""Edits a model from Python: write facts, look at what changed, take one back, save the result."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, Self

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hiedit_agents.editing import arguments
from hiedit_agents.editing.adapter import AdapterReport
from hiedit_agents.editing.checks import Checks, share
from hiedit_agents.editing.controls import end_id
from hiedit_agents.editing.export import ASKED, Saved, measure, save_adapter, save_delta, save_model
from hiedit_agents.editing.facts import Fact, Facts, as_requests, warn_of_subjects
from hiedit_agents.editing.found import FoundWeights
from hiedit_agents.editing.held import for_editing
from hiedit_agents.editing.in_place import different
from hiedit_agents.editing.ledger import Ledger
from hiedit_agents.editing.levels import HowToEdit, make_levels
from hiedit_agents.editing.model_card import Measured
from hiedit_agents.editing.other_weights import Watch
from hiedit_agents.editing.results import EditResult
from hiedit_agents.editing.session import Session
from hiedit_agents.editing.taken_up import open_ledger
from hiedit_agents.registry import default_agent
from hiedit_env.datasets.requests import Request
from hiedit_env.errors import SettingsError, whole_number
from hiedit_env.model.architectures import find_candidates
from hiedit_env.model.asking import PromptForm
from hiedit_env.model.loading import load_model
from hiedit_env.model.relatives import known_as
from hiedit_env.model.saving import source_folder
from hiedit_env.resident.resident import ResidentLLM
from hiedit_env.rules.base import UpdateRule


class Editor:
    """Edits a live model.

    Every edit is recorded in :attr:`ledger`, so any of them can be taken back. The model is the
    caller's own object: it keeps its device, its dtype and, between the calls, its training mode
    and ``requires_grad``. What is written is written into its weights. As a context manager the
    editor leaves the model bit for bit as it found it; so does :meth:`close`.

    Args:
        model: A causal language model of transformers.
        tokenizer: Its tokenizer.
        agent: Who edits, see :mod:`hiedit_agents.registry`; by default ``hiedit`` where a trained
            one fits the model, else ``all-layers``.
        layers: Patterns of candidate layers; by default those the agent was trained for, else those
            of published work on the model, else by its structure.
        ledger: Folder of a ledger that is kept on disk. One that is there is gone on with: its
            edits are written into the model first. By default the ledger is in memory. In either
            case it begins with that of a saved model that is edited again.
        checks: What must hold after an edit; see :class:`Checks`.
        prompt_form: Form in which facts are edited and asked: ``"plain"``, ``"chat"`` or
            ``"both"``; by default both where the tokenizer has a chat template, else plain.
        end_token: Whether the token that ends the model's turn is put behind every answer; by
            default yes, except for the toy models and where the tokenizer has none.
        max_error: Relative error with which the updates of one fact are put together into a single
            one of a smaller rank before they are checked and recorded: a ledger and an adapter are
            several times smaller then. 0 keeps them as they were computed.
        name: Name of the model, to find what belongs to it; by default where it was loaded from.
        earlier: Facts that were edited into the model before, earliest first, for an agent that
            rehearses; those of its ledger are known without.
        layers_per_edit, max_steps_per_edit, step_size, update_rule: As for
            :func:`hiedit_agents.make_agent`.
        memory_check: As ``memory`` of :func:`hiedit_env.load_model`; for facts that come as well.
        seed: Of everything that is drawn.

    Raises:
        ModelError, LayerError: the model cannot be edited; it is as it was.
        SettingsError, CheckpointError: an agent that does not fit.
        LedgerError: the ledger belongs to another model, or is damaged.

    >>> from hiedit_agents import Editor
    >>> with Editor.from_pretrained("tiny") as editor:
    ...     [result] = editor.edit(("The capital of Norland is", "Averlund"))
    >>> result.status, result.id, result.steps > 0
    ('written', 1, True)
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        agent: str | None = None,
        layers: str | Sequence[str] | None = None,
        ledger: str | PathLike[str] | None = None,
        checks: Checks | None = None,
        prompt_form: PromptForm | None = None,
        end_token: bool | None = None,
        max_error: float = 0.01,
        name: str | None = None,
        earlier: Sequence[Request] = (),
        layers_per_edit: int | None = None,
        max_steps_per_edit: int | None = None,
        step_size: float | None = None,
        update_rule: str | None = None,
        memory_check: str | None = None,
        seed: int = 0,
    ) -> None:
        arguments.require_model(model, tokenizer)
        share(max_error, "max_error")
        numbers = layers_per_edit, max_steps_per_edit
        arguments.require_settings(agent, checks, earlier, end_token, numbers, seed)
        arguments.require_float32_default()
        name = str(model.name_or_path or "") if name is None else name
        chosen = agent or default_agent(name, layers, update_rule)
        self._how = HowToEdit(chosen, *numbers, step_size, update_rule, seed)
        made = self._how.make()
        find = getattr(made, "candidate_layers", None)
        patterns = find(name) if layers is None and find is not None else layers
        end = end_id(tokenizer, name, end_token)
        form = arguments.form_for(tokenizer, prompt_form)
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self._closed = self._at_it = False
        self._lock = threading.RLock()
        self._folder: Path | None = None
        with for_editing(model):
            candidates = find_candidates(model, patterns, known_as(name))
            self.llm = ResidentLLM(model, tokenizer, candidates, end_id=end)
            levels = make_levels(self._how, made, self.llm, name)
            opened = open_ledger(self.llm, name, ledger)
            try:
                rest = (checks or Checks(), form, max_error, tuple(earlier), memory_check)
                self._session = Session(self.llm, levels, opened, *rest)
            except BaseException:
                opened.found.put_back(self.llm)
                opened.ledger.close()
                raise
        self._watch = Watch(self.llm, opened.ledger.base.others)

    @classmethod
    def from_pretrained(
        cls,
        name: str | PathLike[str],
        *,
        device: str = "cpu",
        dtype: str = "float32",
        trust_remote_code: bool = False,
        **settings: Any,
    ) -> Self:
        """Loads a model and its tokenizer, and an editor for them.

        Args:
            name: ``"smollm2-135m"``, ``"tiny"``, a folder, or a Hugging Face id.
            device: ``"cpu"``, ``"cuda"``, ``"cuda:N"`` or ``"mps"``.
            dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
            trust_remote_code: Whether to run Python code that comes with the model.
            **settings: As for :class:`Editor`.

        Raises:
            ModelError, DeviceError, NotEnoughMemoryError: the model cannot be loaded.
        """
        loaded = load_model(
            str(name),
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            progress=False,
            layers=settings.get("layers"),
            memory=settings.get("memory_check"),
        )
        editor = cls(loaded.model, loaded.tokenizer, **{"name": str(name), **settings})
        editor._folder = source_folder(loaded.model)
        return editor

    # -- editing ----------------------------------------------------------------------------------

    def edit(
        self,
        facts: Facts,
        *,
        together: int = 1,
        on_results: Callable[[Sequence[EditResult]], None] | None = None,
    ) -> list[EditResult]:
        """Writes facts into the model.

        A fact that the model gives already is left alone. A prompt that was edited before gets its
        new answer on top of the old one: the earlier edit stays in place below it, and comes to the
        fore again when this one is undone. An edit that fails its checks is rolled back.

        Args:
            facts: One or several; see :mod:`hiedit_agents.editing.facts`.
            together: Number of facts that are written by one edit; it has one id, so they are also
                undone together. If they fail a check together, they are written one by one.
            on_results: Called with the results of every edit as soon as it is made.

        Returns:
            One result per fact, in order.

        Raises:
            DatasetError, PromptError, NotEnoughMemoryError: of :meth:`check`; nothing has changed.
            LedgerError: the weights were changed by somebody else since the last call.

        Whatever is raised later, the model holds the edits of the ledger and no others.
        """
        whole_number(together, "together", 1)
        requests = as_requests(facts)
        with self._at_work():
            asked = [self._session.arriving(request) for request in requests]
            warn_of_subjects(self.low_level, [(fact.request, fact.prompts) for fact in asked])
            results: list[EditResult] = []
            while len(results) < len(asked):
                place = len(results)
                group = different(asked[place : place + together])
                made = self._session.edit(group, place / len(asked))
                results += made
                if on_results is not None:
                    on_results(made)
            return results

    def check(self, fact: Fact) -> None:
        """Checks that a fact can be edited; nothing is run or changed.

        Raises:
            DatasetError, PromptError, NotEnoughMemoryError: it cannot be read, tokenised or run.
        """
        for request in as_requests(fact):
            self._session.arriving(request)

    def undo(self, id: int) -> None:
        """Takes one edit back, see :mod:`hiedit_agents.editing.undo`.

        The weights become those that the other recorded updates give, as if this one had never been
        written. Later updates were computed while it was in place, and stay as they are.

        Args:
            id: Of an edit that is in place.

        Raises:
            LedgerError: there is no such edit, or it is not in place; nothing has changed.
        """
        with self._at_work():
            number = self.ledger.require_edit(id, in_place=True)
            left = tuple(i for i in self.ledger.active if i != number)
            self._session.go_to(left, "revoke", number)

    def rewind(self, id: int) -> None:
        """Goes back to the state right after an event of the ledger, bit for bit.

        Args:
            id: Of any event; 0 for the unedited model. Events after it stay in the ledger, so it is
                possible to go forward again.

        Raises:
            LedgerError: there is no such event; nothing has changed.
        """
        with self._at_work():
            self._session.go_to(self.ledger.active_at(id), "rewind", id)

    def ask(
        self, prompts: str | Sequence[str], *, max_new_tokens: int = 24, chat: bool = False
    ) -> list[str]:
        """Greedy continuations at the present weights.

        Args:
            prompts: One or several.
            max_new_tokens: Budget of each.
            chat: Whether they are messages of a user in the tokenizer's chat template.

        Raises:
            PromptError: a prompt that cannot be tokenised, or no chat template.
            SettingsError: no texts, or a budget below 1.
        """
        with self._at_work():
            texts = arguments.texts_of(prompts)
            most = whole_number(max_new_tokens, "max_new_tokens", 1)
            encoded = [self.llm.encoder.encode_chat(t, "x") if chat else t for t in texts]
            return self.llm.generate(encoded, [most] * len(texts))

    def measure(self, *, facts: int = ASKED) -> Measured:
        """Asks the model for the facts in place and for control prompts.

        Args:
            facts: Number of facts that are asked at most, evenly spaced.
        """
        with self._at_work():
            return measure(self._session, facts)

    @property
    def ledger(self) -> Ledger:
        """The ledger: its events, and which edits are in place."""
        return self._session.ledger

    @property
    def agent(self) -> str:
        """Who edits, and which trained numbers it uses."""
        levels = self._session.levels
        return f"{levels.name}: {levels.explained}"

    @property
    def found(self) -> FoundWeights:
        """The weights as the model was found, which :meth:`close` puts back."""
        return self._session.found

    @property
    def low_level(self) -> UpdateRule:
        """What computes the updates."""
        return self._session.levels.low

    @property
    def max_steps_per_edit(self) -> int:
        """Maximum number of primitive steps per fact."""
        return self._session.levels.max_steps

    # -- saving -----------------------------------------------------------------------------------

    def save(self, out: str | PathLike[str]) -> Saved:
        """Writes the edited model as an ordinary Hugging Face folder.

        The folder appears whole or not at all. Beside the model it holds the ledger and a model
        card with the edits and what they were measured to do. A model of :meth:`from_pretrained`
        is a copy of its folder with other bytes in the edited matrices alone; a live one is
        written by ``save_pretrained``.

        Args:
            out: A folder that does not exist or is empty.

        Raises:
            ResultsExistError: it is not empty.
            ModelError: the model's folder cannot be copied.
            SettingsError: it cannot be written.
        """
        with self._at_work():
            return save_model(self._session, Path(out), self._folder)

    def save_adapter(
        self, out: str | PathLike[str], *, max_rank: int | None = None, allow_loss: bool = False
    ) -> AdapterReport:
        """Writes the edits as a LoRA adapter for the unedited model, in PEFT's format.

        Args:
            out: A folder that does not exist or is empty.
            max_rank: Largest rank; by default as much as makes it exact.
            allow_loss: Whether an adapter of a smaller rank may give fewer facts.

        Raises:
            ResultsExistError: ``out`` is not empty.
            LedgerError: no edit is in place.
            SettingsError: a rank below 1, or one that cannot hold the edits; nothing was written.
        """
        with self._at_work():
            return save_adapter(self._session, Path(out), max_rank, allow_loss)

    def save_delta(self, path: str | PathLike[str]) -> None:
        """Writes the edited matrices alone; :func:`~.delta.apply_delta` puts them into the model.

        Args:
            path: A file that does not exist, such as ``edits.safetensors``.

        Raises:
            ResultsExistError: it is there.
            OutputError: it cannot be written.
        """
        with self._at_work():
            save_delta(self._session, Path(path))

    def close(self) -> None:
        """Puts the model back bit for bit as it was found, and closes the ledger."""
        with self._lock:
            arguments.refuse_nesting(self._at_it)
            if not self._closed:
                self._closed = True
                with for_editing(self.model):
                    self._session.found.put_back(self.llm)
                self.ledger.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """The model ready to be edited, and nobody else's changes in it."""
        with self._lock:
            if self._closed:
                raise SettingsError("this editor is closed; make a new one")
            arguments.refuse_nesting(self._at_it)
            arguments.require_float32_default()
            with for_editing(self.model):
                self._watch.refuse_changes()
                try:
                    self._at_it = True
                    yield
                finally:
                    self._at_it = False
                    self._watch.note()
                    self.llm.upper.drop_copies()
