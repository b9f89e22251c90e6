"""Facts as they come: ``hiedit edit --facts -`` reads one JSON a line and answers one JSON a line.

Every line of standard input is a fact in any row format of a data file. The answers come in the
order of the lines, each as soon as its fact is written:

- ``{"line": 1, "status": …, …}`` with the fields of :class:`~hiedit_agents.EditResult`; ``status``
  is ``written``, ``known`` (nothing was done) or ``rolled back`` (a check failed);
- ``{"line": 2, "status": "refused", "problems": […]}`` for a line that is no fact;
- ``{"health": {"edits": …, "asked": …, "given": …, "agreement": …}}`` every ``health_every`` edits
  and at the end: a sample of the facts in place, and control prompts.

At the end of the input the model is saved. Nothing is lost before, since the ledger is on disk
(see :mod:`.unfinished`): the same command, started again with the same lines, answers those that it
had written as before and goes on with the others.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO, TextIO

from hiedit_agents.editing.checks import Checks
from hiedit_agents.editing.editor import Editor
from hiedit_agents.editing.export import Saved
from hiedit_agents.editing.facts import as_requests
from hiedit_agents.editing.out_folder import OutFolder
from hiedit_agents.editing.results import EditResult
from hiedit_benchmarks.commands.live_editor import live_editor
from hiedit_benchmarks.commands.stream_settings import StreamSettings
from hiedit_benchmarks.commands.unfinished import Unfinished, refuse_overlap, tidied
from hiedit_benchmarks.comparison.settings import EditSettings
from hiedit_env.datasets.files import MAX_FILE_BYTES, MAX_LINE_BYTES, standard_input
from hiedit_env.datasets.requests import Request
from hiedit_env.errors import DatasetError, NotEnoughMemoryError, PromptError
from hiedit_env.files import parse_json

#: Exit status where the stream was stopped, or no fact is in the model at the end.
STOPPED = 3
#: Facts that are asked for a line about the health.
SAMPLE = 32


def main(
    settings: EditSettings,
    agent: str | None,
    end_token: bool | None,
    out: Path,
    stream: StreamSettings,
) -> int:
    """Edits from standard input to standard output, then saves.

    Args:
        settings: The model and how it is edited.
        agent: Who edits; None for the default of :class:`~hiedit_agents.Editor`.
        end_token: As there.
        out: A folder that does not exist or is empty.
        stream: The rest.

    Returns:
        Exit status: 0, or :data:`STOPPED`.
    """
    # Refuses a folder that cannot be written before hours of editing.
    with tidied(out, stream.ledger):
        place = OutFolder(out)
    refuse_overlap(out, stream.ledger)
    checks = Checks(min_agreement=stream.min_agreement, max_lost=stream.max_lost)
    given = {"agent": agent, **asdict(settings), "end_token": end_token, **asdict(checks)}
    unfinished = Unfinished(place.out, stream.ledger, given)
    with _opened(settings, agent, end_token, checks, unfinished) as editor:
        print(f"hiedit: agent {editor.agent}", file=sys.stderr)
        batch, done = settings.edits_per_step, unfinished.written(editor.ledger)
        facts = Stream(editor, stream, batch, standard_input(), sys.stdout, done)
        healthy = facts.run()
        saved: Saved = editor.save(out)
    print(f"hiedit: saved to {out}; {saved.measured.text}", file=sys.stderr)
    if facts.unasked and healthy:
        print(_of_no_line(facts.unasked, out), file=sys.stderr)
    return 0 if healthy and saved.measured.given else STOPPED


@contextmanager
def _opened(
    settings: EditSettings,
    agent: str | None,
    end_token: bool | None,
    checks: Checks,
    unfinished: Unfinished,
) -> Iterator[Editor]:
    """The editor, with its ledger in the folder of ``unfinished``."""
    try:
        editor = live_editor(settings, agent, end_token, unfinished.folder, checks)
    except BaseException:
        unfinished.end(None, saved=False)
        raise
    with editor:
        unfinished.begin(editor.ledger)
        try:
            yield editor
        except BaseException:
            unfinished.end(editor.ledger, saved=False)
            raise
        unfinished.end(editor.ledger, saved=True)


class Stream:
    """One stream of facts into one editor.

    Args:
        editor: The editor.
        settings: See :class:`StreamSettings`.
        batch: Facts that are written together.
        source: Lines of JSON.
        answers: Where the answers go, a line each.
        done: What became of facts that the same command wrote before it was interrupted, by prompt
            and answer. The first lines that ask for them are answered so, and nothing is written.
    """

    def __init__(
        self,
        editor: Editor,
        settings: StreamSettings,
        batch: int,
        source: BinaryIO,
        answers: TextIO,
        done: Mapping[tuple[str, str], list[EditResult]] | None = None,
    ) -> None:
        self._done = {pair: list(results) for pair, results in (done or {}).items()}
        self._editor, self._settings, self._batch = editor, settings, batch
        self._source, self._answers = source, answers
        self._written = 0

    def run(self) -> bool:
        """Reads to the end of the input, or until the model's health falls under the limit.

        Returns:
            Whether the input's end was reached.
        """
        waiting: list[tuple[int, Request]] = []
        for number, found in self._lines():
            done = None if isinstance(found, str) else self._written_before(found)
            if isinstance(found, str) or done is not None:
                # In the order of the lines.
                healthy = self._edit(waiting)
                waiting = []
                refused = {"status": "refused", "problems": [found]}
                self._say({"line": number, **(refused if done is None else _told(done))})
            else:
                waiting.append((number, found))
                healthy = len(waiting) < self._batch or self._edit(waiting)
                if len(waiting) >= self._batch:
                    waiting = []
            if not healthy:
                return False
        healthy = self._edit(waiting)
        return healthy and self._health()

    @property
    def unasked(self) -> list[EditResult]:
        """Edits of before the interruption that no line so far has asked for."""
        return [result for results in self._done.values() for result in results]

    def _lines(self) -> Iterator[tuple[int, Request | str]]:
        """Number of every line, with its requests, or with what is wrong."""
        number = 0
        while line := self._source.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                problem = f"the line has more than {MAX_LINE_BYTES / 1e6:.4g} MB"
                size = len(line)
                while line and not line.endswith(b"\n"):
                    # Otherwise a device would be read for ever.
                    if size > MAX_FILE_BYTES or b"\0" in line:
                        yield number, f"{problem} and seems to have no end; nothing more is read"
                        return
                    line = self._source.readline(MAX_LINE_BYTES + 1)
                    size += len(line)
                yield number, f"{problem}; shorten it"
                continue
            if not line.strip():
                continue
            try:
                found = as_requests(parse_json(line))
                if not found:
                    yield number, "the line holds no fact"
                for request in found:
                    self._editor.check(request)
                    yield number, request
            except (DatasetError, PromptError, NotEnoughMemoryError) as error:
                yield number, str(error)
            except ValueError as error:  # no JSON, or no UTF-8
                yield number, f"the line is no JSON: {error}"

    def _written_before(self, request: Request) -> EditResult | None:
        """What became of a fact that the command had written before it was interrupted."""
        done = self._done.get((request.prompt, request.answer))
        return done.pop(0) if done else None

    def _edit(self, waiting: Sequence[tuple[int, Request]]) -> bool:
        """Writes some facts and tells the results.

        Returns:
            False where the model's health fell under the limit.
        """
        if not waiting:
            return True
        requests = [request for _, request in waiting]
        results = self._editor.edit(requests, together=self._batch)
        for (number, _), result in zip(waiting, results, strict=True):
            self._say({"line": number, **_told(result)})
        before = self._written
        self._written += sum(result.status == "written" for result in results)
        every = self._settings.health_every
        return before // every == self._written // every or self._health()

    def _health(self) -> bool:
        """Asks the model, tells the result, and says whether it is above the limit."""
        found = self._editor.measure(facts=SAMPLE)
        self._say({"health": asdict(found)})
        least = self._settings.stop_below
        shares = {
            "of the edited facts asked are still given": found.given / max(found.asked, 1),
            "agreement with the unedited model on control prompts": found.agreement,
        }
        for what, share in shares.items():
            if share is not None and share < least and found.asked:
                print(
                    f"hiedit: stopped after {found.edits} edits: {share:.2f} {what}, under "
                    f"--stop-below {least:g}; the edits so far are saved",
                    file=sys.stderr,
                )
                return False
        return True

    def _say(self, answer: dict[str, object]) -> None:
        self._answers.write(json.dumps(answer, ensure_ascii=False) + "\n")
        self._answers.flush()


def _of_no_line(results: Sequence[EditResult], out: Path) -> str:
    """Says that the saved model holds edits of an interrupted run that no line asked for."""
    count = "1 edit" if len(results) == 1 else f"{len(results)} edits"
    first = results[0]
    pair = " → ".join(repr(text)[:100] for text in (first.prompt, first.answer))
    return (
        f"hiedit: the model holds {count} of the interrupted run that no line asked for ({pair}); "
        f"'hiedit revoke {out} {first.id}' takes it back"
    )


def _told(result: EditResult) -> dict[str, object]:
    """The fields of a result, the status first."""
    fields = result.to_json()
    return {"status": fields.pop("status"), **fields}
