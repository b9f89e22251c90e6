"""The study of other questions about edited subjects: its shares are those of single passes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hiedit_agents.hierarchy import other_sentences
from hiedit_benchmarks.studies import about_subjects
from hiedit_benchmarks.studies.about_subjects import (
    GENERATED,
    KEPT,
    QUESTIONS,
    STATEMENTS,
    Alone,
    main,
)
from hiedit_env.errors import ResultsExistError, SettingsError
from tests.benchmarks.studies.test_held_out import alone


def made(out: Path, edits: int = 2) -> Alone:
    facts = about_subjects.Options(
        facts=("tiny-facts",), out=out, model="tiny", agent="all-layers", edits=edits
    )
    return Alone(facts)


def test_shares_are_those_of_asking_question_by_question(tmp_path: Path) -> None:
    study = made(tmp_path)
    llm, request = study.llm, study.requests[1]
    texts = [text.format(request.subject) for text in STATEMENTS]
    asked = [llm.encode(text, request.answer).prompt_ids for text in texts]
    said = [alone(llm, ids, KEPT) for ids in asked]
    before = llm.weights_fingerprint()
    found = study.fact(1)
    assert llm.weights_fingerprint() == before
    assert found is not None
    study.write(1, 2, 1)
    kept, first, answers = [], [], []
    for ids, own in zip(asked, said, strict=True):
        with torch.no_grad():
            logits = llm.model(input_ids=torch.tensor([[*ids, *own]])).logits[0]
        same = logits.argmax(-1)[len(ids) - 1 : -1] == torch.tensor(own)
        kept.append(float(same.float().mean()))
        first.append(float(same[0]))
        text = llm.encoder.decode(alone(llm, ids, GENERATED))
        answers.append(float(request.answer.casefold() in text.casefold()))
    shares = found["shares"]
    assert shares["kept"] == pytest.approx(sum(kept) / len(kept))
    assert shares["first"] == pytest.approx(sum(first) / len(first))
    assert shares["answer"] == pytest.approx(sum(answers) / len(answers))
    assert 0 < shares["kept"] < 1
    assert "chat_kept" not in shares


def test_every_fact_is_written_into_the_unedited_model(tmp_path: Path) -> None:
    study = made(tmp_path)
    alone_first = study.fact(1)
    study.fact(0)
    again = study.fact(1)
    assert alone_first is not None
    assert again is not None
    assert again["shares"] == alone_first["shares"]


def test_a_fact_that_is_broken_off_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = made(tmp_path)
    own = study._writer.write
    monkeypatch.setattr(
        study._writer, "write", lambda *args: replace(own(*args), problem="broken off")
    )
    found = study.fact(1)
    assert found is not None
    assert (found["problem"], found["shares"]["kept"]) == ("broken off", 1.0)
    assert "1 facts, 1 broken off" in about_subjects.report([found])


def test_what_is_too_long_to_be_asked_is_left_out(tmp_path: Path) -> None:
    study = made(tmp_path)
    name = study.requests[1].subject
    longest = max(len(study.llm.encoder.encode_prompt(s.format(name))) for s in STATEMENTS)
    study.llm.encoder.max_length = longest
    assert len(study._own(study.requests[1], "plain")) == len(STATEMENTS) - 1


def test_no_question_is_one_that_an_agent_keeps() -> None:
    asked = {text.casefold() for text in (*STATEMENTS, *QUESTIONS)}
    kept = (*other_sentences.STATEMENTS, *other_sentences.QUESTIONS)
    answers = (text for pair in other_sentences.ANSWERS for text in pair)
    assert asked.isdisjoint(text.casefold() for text in (*kept, *answers))


def test_a_line_for_every_fact_and_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["tiny-facts", "--model", "tiny", "--agent", "all-layers", "--edits", "3"]
    assert main([*where, "--out", str(tmp_path / "a")]) == 0
    lines = (tmp_path / "a" / "results.jsonl").read_text().splitlines()
    facts = [json.loads(line) for line in lines]
    assert len(facts) == 3
    assert all(fact["made_by"]["agent"] == "all-layers" for fact in facts)
    text = (tmp_path / "a" / "results.md").read_text()
    assert text == about_subjects.report(facts) == capsys.readouterr().out
    assert "| chat |" not in text
    assert "3 facts" in text
    with pytest.raises(ResultsExistError, match="exists; give another --out"):
        main([*where, "--out", str(tmp_path / "a")])


def test_facts_without_a_subject_are_left_out(tmp_path: Path) -> None:
    file = tmp_path / "facts.json"
    file.write_text(json.dumps([{"prompt": "It lies on the river", "answer": "Wend"}]))
    out = tmp_path / "a"
    with pytest.raises(SettingsError, match="none of the facts names its subject"):
        main(
            [
                str(file),
                "--model",
                "tiny",
                "--agent",
                "all-layers",
                "--edits",
                "1",
                "--out",
                str(out),
            ]
        )
    assert not out.exists()
    with pytest.raises(SettingsError, match="FACTS must be given"):
        main(["--out", str(out)])
