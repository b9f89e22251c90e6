"""The study of long streams: its shares are those of asking the edited model prompt by prompt."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hiedit_benchmarks.studies import held_out, held_out_report
from hiedit_benchmarks.studies.held_out import main
from hiedit_benchmarks.studies.held_out_report import draw, interval, report
from hiedit_env.errors import HieditError, OutputError, ResultsExistError, SettingsError
from hiedit_env.evaluation.matching import EXTRA_TOKENS, is_match
from hiedit_env.resident.resident import ResidentLLM


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def alone(llm: ResidentLLM, ids: Sequence[int], budget: int) -> list[int]:
    """Greedy tokens of one prompt by whole passes, without cache, padding or ``generate``."""
    text = list(ids)
    while len(text) < len(ids) + budget:
        with torch.no_grad():
            text.append(int(llm.model(input_ids=torch.tensor([text])).logits[0, -1].argmax()))
        if text[-1] in llm.end_ids:
            break
    return text[len(ids) :]


def test_a_stream_is_asked_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every share is that of asking the model at this moment, prompt by prompt."""
    own = held_out.Stream.ask
    wanted: list[dict[str, list[float]]] = []
    said: dict[str, list[int]] = {}

    def by_hand(self: held_out.Stream, edits: int, number: int) -> Any:
        right, left = [], []
        for request in self.requests[: min(edits, number)]:
            prompt = self.llm.encode(request.prompt, request.answer)
            new = alone(self.llm, prompt.prompt_ids, len(prompt.answer_ids) + EXTRA_TOKENS)
            right.append(float(is_match(self.llm.encoder.decode(new), request.answer)))
            shares = []
            for probe in request.locality[:2]:
                ids = self.llm.encode(probe.prompt, probe.answer).prompt_ids
                with self.llm.unedited():
                    answer = said.setdefault(probe.prompt, alone(self.llm, ids, 5))
                with torch.no_grad():
                    best = self.llm.model(input_ids=torch.tensor([[*ids, *answer]])).logits[0]
                tokens = best.argmax(-1)[len(ids) - 1 : -1].tolist()
                shares.append(np.mean([a == b for a, b in zip(tokens, answer, strict=True)]))
            left.append(float(np.mean(shares)))
        kept = []
        for ids in self._texts._ids:
            text = torch.tensor([ids])
            with torch.no_grad():
                now = self.llm.model(input_ids=text).logits[0]
                with self.llm.unedited():
                    before = self.llm.model(input_ids=text).logits[0]
            pairs = zip(now.tolist(), before.tolist(), strict=True)
            kept.append(float(np.mean([np.argmax(a) == np.argmax(b) for a, b in pairs])))
        wanted.append({"efficacy": right, "specificity": left, "texts": kept})
        return own(self, edits, number)

    monkeypatch.setattr(held_out.Stream, "ask", by_hand)
    where = ["tiny-facts", "--model", "tiny", "--agent", "all-layers", "--out", str(tmp_path / "a")]
    more = ["--edits", "5", "--check-at", "2", "--ask", "5", "--unrelated", "2", "--texts", "3"]
    assert main([*where, *more]) == 0
    first, last = rows(tmp_path / "a")
    assert (first["edits"], first["asked"], len(first["written"])) == (2, [0, 1], 2)
    assert (last["edits"], last["asked"], len(last["written"])) == (5, [0, 1, 2, 3, 4], 3)
    for row, found in zip((first, last), wanted, strict=True):
        assert row["shares"]["efficacy"] == found["efficacy"]
        assert row["shares"]["specificity"] == pytest.approx(found["specificity"])
        assert row["shares"]["texts"] == pytest.approx(found["texts"])
        assert len(found["texts"]) == 3
        assert "chat_efficacy" not in row["shares"]
    assert 0 < min(wanted[1]["texts"]) < 1
    assert sum(wanted[0]["efficacy"]) > 0
    assert min(wanted[1]["specificity"]) < 1
    assert (tmp_path / "a" / "results.md").read_text() == report([first, last])
    assert (tmp_path / "a" / "results.png").read_bytes() == draw([first, last])
    with pytest.raises(ResultsExistError, match=r"exists; give another --out"):
        main(where)


def test_at_most_so_many_facts_are_asked_evenly_spaced() -> None:
    assert held_out._places(7, 10) == list(range(7))
    assert held_out._places(10, 4) == [0, 2, 5, 7]


def test_a_fact_that_is_broken_off_leaves_the_model_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = held_out.Options(facts=("tiny-facts",), out=tmp_path, model="tiny", agent="all-layers")
    facts = held_out.Stream(replace(given, edits=2), [2])
    before = facts.llm.weights_fingerprint()
    own = facts._writer.write

    def broken(*args: Any) -> Any:
        return replace(own(*args), problem="broken off")

    monkeypatch.setattr(facts._writer, "write", broken)
    assert [one.problem for one in facts.write(0, 2, 1)] == ["broken off"] * 2
    assert facts.llm.weights_fingerprint() == before
    monkeypatch.undo()
    assert [one.problem for one in facts.write(0, 2, 2)] == [None] * 2
    assert facts.llm.weights_fingerprint() != before


def test_what_was_asked_stays_when_the_work_is_broken_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = held_out.Stream.write

    def once(self: held_out.Stream, first: int, last: int, together: int) -> Any:
        if first:
            raise KeyboardInterrupt
        return own(self, first, last, together)

    monkeypatch.setattr(held_out.Stream, "write", once)
    where = ["tiny-facts", "--model", "tiny", "--agent", "all-layers", "--out", str(tmp_path / "a")]
    with pytest.raises(KeyboardInterrupt):
        main([*where, "--edits", "4", "--check-at", "2", "--together", "2"])
    assert [row["edits"] for row in rows(tmp_path / "a")] == [2]


def test_the_picture_has_a_panel_for_every_form(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[str, list[str]]] = []

    def note(figure: Any) -> bytes:
        for axes in figure.axes:
            drawn.append((axes.get_title(), [line.get_label() for line in axes.get_lines()]))
        return b""

    monkeypatch.setattr(held_out_report, "png", note)
    shares = {"efficacy": [1.0], "chat_efficacy": [0.5], "chat_specificity": [1.0], "controls": [1]}
    draw([{"edits": n, "shares": shares} for n in (1, 2)])
    draw([{"edits": n, "shares": {"efficacy": [1.0]}} for n in (1, 2)])
    assert drawn == [
        ("plain", ["facts"]),
        ("in chat", ["facts", "unrelated prompts"]),
        ("plain", ["facts"]),
    ]


def test_intervals_and_table_by_hand() -> None:
    assert interval([]) is None
    assert interval([None, 0.5]) == (50.0, 50.0, 50.0)
    found = interval([1.0, 0.0] * 50)
    assert found is not None
    # 50 ± 1.96 · 50 / √100
    assert found[0] == 50.0
    assert found[1:] == pytest.approx((40.2, 59.8), abs=1.5)
    written = [{"seconds": second} for second in (1.0, 1.25, 9.0)]
    check = {"edits": 7, "written": written, "shares": {"efficacy": [1.0], "controls": [0.5]}}
    assert report([check]).splitlines()[2] == (
        "| 7 | 100.0 [100, 100] / – | – / – | – / – | 50.0 [50, 50] | – | 1.2 |"
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "FACTS must be given"),
        (["tiny-facts", "--edits", "3", "--check-at", "4"], "check_at must be from 1 to --edits 3"),
        (["tiny-facts", "--edits", "3", "--check-at", "0"], "check_at must be from 1 to --edits 3"),
    ],
)
def test_what_it_refuses(arguments: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=said):
        main([*arguments, "--model", "tiny", "--out", str(tmp_path / "a")])
    assert not (tmp_path / "a").exists()


def test_what_cannot_begin_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "a"
    where = ["tiny-facts", "--model", "tiny", "--agent", "all-layers", "--out", str(out)]
    with pytest.raises(HieditError, match="there are only 160 facts"):
        main([*where, "--edits", "9999"])
    assert not out.exists()
    # What was there before stays.
    out.mkdir()
    (out / "mine.txt").write_text("x")
    with pytest.raises(HieditError, match="there are only 160 facts"):
        main([*where, "--edits", "9999"])
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


def test_a_place_that_cannot_be_written_is_named_before_anything_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"file/a/results.jsonl cannot be written"):
        main(["tiny-facts", "--model", "no such model", "--out", str(tmp_path / "file" / "a")])
