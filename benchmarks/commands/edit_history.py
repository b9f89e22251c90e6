"""``edits.json``: what has been edited into a model, over all runs of ``hiedit edit`` so far.

Format 3 has the fields

- ``format``: 3.
- ``runs``: one entry per run, in order: ``agent``, ``identity``, ``settings`` (with the rule, the
  step size, the horizon and the number of edits that ran), ``versions``, ``report`` (what the
  model said before and after, see :mod:`.edit_report`) and ``saved`` (what loading it again
  showed).
- ``facts``: the facts of all runs in the order they were edited: ``prompt``, ``answer``,
  ``subject``, ``prompt_form`` (the form in which it was edited) and ``system`` (None without one),
  ``run`` (index of the run), ``before`` and ``after`` (greedy continuations, None where it
  was edited in chat only), ``chat_before`` and
  ``chat_after`` (the same in chat, where it was edited in chat), ``answered_right_after`` and
  ``answered`` (under teacher forcing), ``generated`` (the answer and nothing else) and ``given``
  (the answer first), both in every form in which it was edited, ``steps``, ``layers``.
- ``agent``, ``identity``, ``settings``, ``versions``: those of the last run.

Files of format 2, which knew the plain form only, and files without ``format``, which are of one
run, are read as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hiedit_agents.editing.ledger import Ledger
from hiedit_agents.editing.ledger_format import FILE as LEDGER
from hiedit_env.datasets.requests import Request
from hiedit_env.errors import HieditError, LedgerError, ModelError
from hiedit_env.files import parse_json

FORMAT = 3
FILE = "edits.json"
_OF_A_RUN = ("agent", "identity", "settings", "versions")


@dataclass(frozen=True, slots=True)
class History:
    """The runs before the present one.

    Args:
        runs: Entries of ``runs``.
        facts: Entries of ``facts``.
        requests: The facts as requests: for every prompt the latest answer, earliest first.
    """

    runs: tuple[dict[str, Any], ...] = ()
    facts: tuple[dict[str, Any], ...] = ()
    requests: tuple[Request, ...] = ()

    def text(self, rehearsed: bool, agent: str) -> str:
        """One line about it.

        Args:
            rehearsed: Whether the agent rehearses these facts.
            agent: Name of the agent that edits now.
        """
        runs = "one earlier run" if len(self.runs) == 1 else f"{len(self.runs)} earlier runs"
        use = "rehearsed and kept" if rehearsed else "kept, though this agent does not rehearse"
        told = f"{FILE} of the model names {len(self.requests)} edited prompts of {runs}: {use}"
        run = self.runs[-1]
        identity = run.get("identity")
        named = identity.get("agent") if isinstance(identity, Mapping) else None
        last = named or run.get("agent")
        if last in (None, agent):
            return told
        return (
            f"{told}; to go on with the agent that wrote the last ones, give --agent {last!s:.200}"
        )


def read_history(folder: Path) -> History:
    """What ``edits.json`` in a model's folder says, and its ledger; nothing where there is none.

    Raises:
        ModelError: ``edits.json`` cannot be read; names the file, what is wrong and the remedy.
        LedgerError: the ledger cannot be read.
    """
    file = folder / FILE
    runs: list[dict[str, Any]] = []
    facts: list[dict[str, Any]] = []
    try:
        if file.is_file():
            record = parse_json(file.read_text(encoding="utf-8"))
            version = record.get("format", 1)
            if version not in (1, 2, FORMAT):
                raise ValueError(f"format {version!r}; this version reads {FORMAT}")
            if version == 1:
                runs = [{key: record[key] for key in _OF_A_RUN}]
            else:
                runs = [dict(run) for run in record["runs"]]
            facts = [{"run": 0, **fact} for fact in record["facts"]]
        latest: dict[str, Request] = {}
        found = _of_ledger(folder)
        more = [fact for fact in found.in_place if _pair(fact) not in {_pair(f) for f in facts}]
        if more:
            facts += [{**fact, "run": len(runs)} for fact in more]
            runs.append(found.run)
        for fact in facts:
            latest.pop(fact["prompt"], None)
            # What was taken back is none of the model's facts any more.
            if _pair(fact) in found.recorded and _pair(fact) not in map(_pair, found.in_place):
                continue
            latest[fact["prompt"]] = Request(
                fact["prompt"],
                fact["answer"],
                fact["subject"],
                prompt_form=fact.get("prompt_form", "plain"),
                system=fact.get("system"),
            )
    except LedgerError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, HieditError) as error:
        raise ModelError(
            f"{file} cannot be read: {type(error).__name__}: {error}; copy the file again, or "
            "remove it to begin a new history"
        ) from error
    return History(tuple(runs), tuple(facts), tuple(latest.values()))


@dataclass(frozen=True, slots=True)
class _OfLedger:
    """What the ledger beside a saved model says.

    Args:
        in_place: Facts in place, as in ``edits.json``, earliest first.
        recorded: Prompt and answer of every fact that was ever recorded.
        run: What is known of the run that wrote them.
    """

    in_place: tuple[dict[str, Any], ...] = ()
    recorded: frozenset[tuple[str, str]] = frozenset()
    run: dict[str, Any] = field(default_factory=dict)


def _pair(fact: Mapping[str, Any]) -> tuple[str, str]:
    return fact["prompt"], fact["answer"]


def _of_ledger(folder: Path) -> _OfLedger:
    if not (folder / LEDGER).is_file():
        return _OfLedger()
    with Ledger.open(folder) as ledger:
        edits = [event for event in ledger if event.kind == "edit"]
        events = [event for event in edits if event.id in set(ledger.active)]
    recorded = frozenset(_pair(f["request"]) for event in edits for f in event.record["facts"])
    if not events:
        return _OfLedger((), recorded)
    last = events[-1].record
    facts = tuple(
        {
            "prompt": fact["request"]["prompt"],
            "answer": fact["request"]["answer"],
            "subject": fact["request"]["subject"],
            "prompt_form": "both" if len(fact["before"]) > 1 else next(iter(fact["before"])),
            "system": fact["request"].get("system"),
            "before": next(iter(fact["before"].values())),
            "after": next(iter(fact["after"].values())),
            "steps": event.record["steps"],
            "layers": event.record["layers"],
        }
        for event in events
        for fact in event.record["facts"]
    )
    made = {"agent": last["agent"], "identity": last["identity"], "settings": {}, "versions": {}}
    return _OfLedger(facts, recorded, made)
