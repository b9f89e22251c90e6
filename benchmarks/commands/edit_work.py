"""Writes the facts of ``hiedit edit``: by an editor with a ledger, or in an episode."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hiedit_agents.editing.checks import Checks
from hiedit_agents.editing.editor import Editor
from hiedit_agents.editing.facts import warn_of_subjects
from hiedit_agents.editing.found import FoundWeights
from hiedit_agents.editing.ledger import Ledger
from hiedit_agents.editing.levels import has_levels
from hiedit_agents.editing.results import EditResult, recorded
from hiedit_agents.editing.session import NO_LAYERS
from hiedit_agents.named.candidates import candidates_for
from hiedit_agents.protocol import Agent
from hiedit_benchmarks.commands.edit_history import History, read_history
from hiedit_benchmarks.commands.unfinished import Unfinished
from hiedit_benchmarks.comparison.compare import make_env
from hiedit_benchmarks.comparison.episode import bar, play, unwrapped
from hiedit_benchmarks.comparison.settings import CompareSettings
from hiedit_env.datasets.requests import Request
from hiedit_env.errors import ModelError, SettingsError
from hiedit_env.model.loading import load_model
from hiedit_env.model.saving import check_source, source_folder
from hiedit_env.resident.resident import ResidentLLM
from hiedit_env.rules.base import UpdateRule

#: What a file of facts is edited with: every edit is kept, and judged at the end by the report.
_NO_CHECKS = Checks(target=False, min_agreement=None, earlier=0)


@dataclass(frozen=True, slots=True)
class WrittenFact:
    """What became of one fact.

    Args:
        steps: Number of primitive steps.
        layers: Names of the layers written.
        answered: Whether right after it all its answer tokens were the argmax.
    """

    steps: int
    layers: tuple[str, ...]
    answered: bool


class EditorWork:
    """Facts written by an :class:`~hiedit_agents.Editor`, each recorded in its ledger.

    Args:
        settings: The model and how it is edited, with what was left open filled in.
        name: Name of the agent.
        agent: The agent itself, for its candidate layers.
        requests: The facts.
        out: Where the model will be saved.
        unfinished: Where the ledger is while it is written.
        progress: Whether to show progress on standard error.
    """

    def __init__(
        self,
        settings: CompareSettings,
        name: str,
        agent: Agent,
        requests: Sequence[Request],
        out: Path,
        unfinished: Unfinished,
        progress: bool,
    ) -> None:
        self._unfinished = unfinished
        self._batch, self._name, self._progress = settings.edits_per_step, name, progress
        with candidates_for([agent], settings.model, settings.layers) as layers:
            loaded = load_model(
                settings.model,
                device=settings.device,
                dtype=settings.dtype,
                trust_remote_code=settings.trust_remote_code,
                progress=progress,
                layers=layers,
                requests=requests,
                memory=settings.memory_check,
            )
            self.source, self.history = _source(loaded.model, out)
            try:
                self._editor = Editor(
                    loaded.model,
                    loaded.tokenizer,
                    agent=name,
                    layers=layers,
                    ledger=unfinished.folder,
                    checks=_NO_CHECKS,
                    prompt_form=settings.prompt_form,
                    end_token=bool(settings.end_token),
                    name=settings.model,
                    earlier=self.history.requests,
                    layers_per_edit=settings.layers_per_edit,
                    max_steps_per_edit=settings.max_steps_per_edit,
                    step_size=settings.step_size,
                    update_rule=settings.update_rule,
                    memory_check=settings.memory_check,
                )
            except BaseException:
                unfinished.end(None, saved=False)
                raise
        self.llm: ResidentLLM = self._editor.llm
        for note in self.llm.notes:
            print(f"hiedit: {note}", file=sys.stderr)
        self.found: FoundWeights = self._editor.found
        self.low: UpdateRule = self._editor.low_level
        self.max_steps: int = self._editor.max_steps_per_edit
        self.ledger: Ledger | None = self._editor.ledger
        self._unfinished.begin(self._editor.ledger)
        self._is_open = True

    def write(self, requests: Sequence[Request]) -> list[WrittenFact]:
        """Writes all of them.

        Raises:
            ModelError: the model collapsed.
        """
        known = self._editor.ledger.facts()
        before = self._unfinished.written(self._editor.ledger)
        told: dict[int, WrittenFact] = {}
        left: list[int] = []
        for i, request in enumerate(requests):
            pair = request.prompt, request.answer
            if before.get(pair):
                # Also where the model does not give it: nothing is written twice.
                told[i] = _written(before[pair].pop(0))
            else:
                left.append(i)
        places = iter(left)
        untouched = 0
        with bar(f"{self._name}: editing", len(requests), self._progress) as shown:
            shown.update(len(told))

            def add(results: Sequence[EditResult]) -> None:
                nonlocal untouched
                for result in results:
                    if result.status == "rolled back" and result.problems != (NO_LAYERS,):
                        raise _collapsed(len(told), "; ".join(result.problems))
                    told[next(places)] = self._told(result, known)
                    untouched += result.status == "known"
                shown.update(len(results))

            chosen = [requests[i] for i in left]
            self._editor.edit(chosen, together=self._batch, on_results=add)
        if untouched:
            print(
                f"hiedit: nothing was written for {untouched} of {len(requests)} facts, which the "
                "model gives already",
                file=sys.stderr,
            )
        return [told[i] for i in range(len(requests))]

    def _told(self, result: EditResult, known: dict[str, tuple[int, Any]]) -> WrittenFact:
        number, request = known.get(result.prompt, (0, {}))
        if result.status == "known" and request.get("answer") == result.answer:
            # By an earlier run.
            edit = recorded(self._editor.ledger[number])
            return _written(next(one for one in edit if one.prompt == result.prompt))
        return _written(result)

    def saved(self) -> None:
        """The edits are in the saved model now; the ledger is needed no more."""
        self.close(saved=True)

    def close(self, *, saved: bool = False) -> None:
        """Closes the ledger; the model stays edited.

        Args:
            saved: Whether the edits are in a saved model.
        """
        if self._is_open:
            self._is_open = False
            self._unfinished.end(self._editor.ledger, saved)


def _written(result: EditResult) -> WrittenFact:
    return WrittenFact(result.steps, result.layers, result.answered)


class EpisodeWork:
    """Facts written in an episode of an environment, by an agent that acts in one only.

    Args:
        settings: As for :class:`EditorWork`.
        agent: The agent.
        out: As there.
        progress: Whether to show progress on standard error.
    """

    #: An agent may change weights in other ways than by updates that could be recorded.
    ledger: Ledger | None = None

    def __init__(self, settings: CompareSettings, agent: Agent, out: Path, progress: bool) -> None:
        self._agent, self._progress = agent, progress
        with ExitStack() as stack:
            layers = stack.enter_context(candidates_for([agent], settings.model, settings.layers))
            self._env = make_env(
                replace(settings, layers=layers),
                progress,
                num_edits=None,
                shuffle=False,
                retention_window=0,
            )
        self._inner = unwrapped(self._env)
        self.llm: ResidentLLM = self._inner.llm
        self.found = FoundWeights(self.llm.snapshot())
        self.source, self.history = _source(self.llm.model, out)
        # Builds the agent for this model, which shows whether it fits.
        agent.reset(self._env, 0)
        self.low: UpdateRule = self._inner.rule
        self.max_steps: int = self._inner.episode.max_steps_per_edit
        self._encoded = [self._inner.episode.evaluator.encode(r) for r in self._inner.requests]
        remember = getattr(self.low, "remember", None)
        if remember is not None:
            encode = self._inner.episode.evaluator.encode
            remember([prompt for r in self.history.requests for prompt in encode(r).prompts])

    def write(self, requests: Sequence[Request]) -> list[WrittenFact]:
        """Writes all of them.

        Raises:
            ModelError: the model collapsed.
        """
        warn_of_subjects(self.low, [(fact.request, fact.prompts) for fact in self._encoded])
        # Of each fact only itself is judged while it is edited; the rest is asked at the end.
        bare = [replace(r, paraphrases=(), locality=(), portability=()) for r in requests]
        episode = play(
            self._env, self._agent, 0, options={"requests": bare}, progress=self._progress
        )
        if episode.error_type is not None:
            raise _collapsed(len(episode.edits), episode.error_type)
        return [
            WrittenFact(
                edit.steps,
                tuple(self.llm.names[i] for i in np.flatnonzero(edit.layers)),
                bool(edit.metrics["answered"]),
            )
            for edit in episode.edits
        ]

    def saved(self) -> None:
        """Nothing is kept elsewhere."""

    def close(self) -> None:
        """Closes the environment."""
        self._env.close()


def begin_work(
    settings: CompareSettings,
    name: str,
    agent: Agent,
    requests: Sequence[Request],
    out: Path,
    unfinished: Unfinished,
    progress: bool,
) -> EditorWork | EpisodeWork:
    """Loads the model and makes the agent ready for it; arguments as for :class:`EditorWork`."""
    if has_levels(agent):
        return EditorWork(settings, name, agent, requests, out, unfinished, progress)
    if unfinished.is_named:
        raise SettingsError(
            f"--ledger: agent {name!r} acts in an environment only, where no updates are recorded; "
            "leave it out, or give an agent that is made of a high and a low level"
        )
    return EpisodeWork(settings, agent, out, progress)


def _source(model: Any, out: Path) -> tuple[Path, History]:
    """The folder that a model was loaded from, and what was edited into it before."""
    source = source_folder(model)
    check_source(source, out)
    return source, read_history(source)


def _collapsed(number: int, reason: str) -> ModelError:
    return ModelError(
        f"the model collapsed at fact {number} ({reason}), nothing was saved; a smaller "
        "--step-size may help"
    )
