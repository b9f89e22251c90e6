"""The study of long streams: what it asks is what transformers alone says of the edited weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hiedit_benchmarks.studies import held_out
from hiedit_benchmarks.studies.held_out import main
from hiedit_benchmarks.studies.held_out_report import interval, report
from hiedit_benchmarks.studies.plain_asking import first_tokens, generated, tokens_kept
from hiedit_env.datasets.load import load_requests
from hiedit_env.errors import ResultsExistError, SettingsError
from hiedit_env.evaluation.matching import EXTRA_TOKENS, is_match
from hiedit_env.model.architectures import find_candidates
from hiedit_env.model.loading import load_model
from hiedit_env.resident.resident import ResidentLLM


def tiny() -> ResidentLLM:
    loaded = load_model("tiny", progress=False)
    return ResidentLLM(loaded.model, loaded.tokenizer, find_candidates(loaded.model, None, "tiny"))


def alone(llm: ResidentLLM, ids: tuple[int, ...], budget: int) -> list[int]:
    """Greedy tokens of one prompt by whole passes, without cache, padding or ``generate``."""
    text = list(ids)
    for _ in range(budget):
        token = int(llm.model(input_ids=torch.tensor([text])).logits[0, -1].argmax())
        text.append(token)
        if token in llm.end_ids:
            break
    return text[len(ids) :]


def test_texts_and_tokens_are_those_of_whole_passes() -> None:
    llm = tiny()
    texts = [r.prompt for r in load_requests("tiny-facts")[:3]]
    prompts = [llm.encode(text, "x") for text in (*texts, f"{texts[0]} {texts[1]}", texts[2][:9])]
    assert len({len(p.prompt_ids) for p in prompts}) > 1
    budgets = [5, 2, 7, 4, 1]
    with torch.no_grad():
        wanted = [alone(llm, p.prompt_ids, n) for p, n in zip(prompts, budgets, strict=True)]
        shown = [llm.encoder.decode(ids) for ids in wanted]
        assert generated(llm, prompts, budgets) == shown
        own = first_tokens(llm, prompts, 4)
        assert [list(p.answer_ids) for p in own] == [alone(llm, p.prompt_ids, 4) for p in prompts]
        assert tokens_kept(llm, own) == [1.0] * 5
        ids = own[0].answer_ids
        other = type(own[0])(own[0].prompt, "x", own[0].prompt_ids, (*ids[:-1], ids[-1] ^ 1))
        assert tokens_kept(llm, [other, own[1]]) == [pytest.approx(1 - 1 / len(ids)), 1.0]


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_a_stream_is_asked_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []
    own = held_out.generated

    def noted(llm: ResidentLLM, prompts: Any, budgets: Any) -> list[str]:
        texts = own(llm, prompts, budgets)
        for prompt, text, budget in zip(prompts, texts, budgets, strict=True):
            assert budget == len(prompt.answer_ids) + EXTRA_TOKENS
            asked.append((prompt.answer, text))
        return texts

    monkeypatch.setattr(held_out, "generated", noted)
    where = ["tiny-facts", "--model", "tiny", "--agent", "all-layers", "--out", str(tmp_path / "a")]
    assert main([*where, "--edits", "5", "--check-at", "2", "5", "--ask", "4"]) == 0
    first, last = rows(tmp_path / "a")
    assert (first["edits"], first["asked"]) == (2, [0, 1])
    # At most four of the five, evenly spaced.
    assert (last["edits"], last["asked"], len(last["steps"])) == (5, [0, 1, 2, 3], 3)
    facts = [float(is_match(text, answer)) for answer, text in asked[:2]]
    assert first["shares"]["efficacy"] == facts
    assert sum(facts) > 0
    assert all(0 <= share <= 1 for share in last["shares"]["neighbours"])
    assert "chat_efficacy" not in last["shares"]
    assert (tmp_path / "a" / "results.md").read_text() == report([first, last])
    assert (tmp_path / "a" / "results.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ResultsExistError, match="exists; give another --out"):
        main(where)


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
        main([*where, "--edits", "4", "--check-at", "2", "4", "--together", "2"])
    assert [row["edits"] for row in rows(tmp_path / "a")] == [2]


def test_intervals_and_table_by_hand() -> None:
    assert interval([]) is None
    assert interval([None, 0.5]) == (50.0, 50.0, 50.0)
    found = interval([1.0, 0.0] * 50)
    assert found is not None
    # 50 ± 1.96 · 50 / √100
    assert found[0] == 50.0
    assert found[1:] == pytest.approx((40.2, 59.8), abs=1.5)
    check = {"edits": 7, "seconds": 1.25, "shares": {"efficacy": [1.0], "controls": [0.5]}}
    assert report([check]).splitlines()[2] == (
        "| 7 | 100.0 [100, 100] / – | – / – | – / – | 50.0 [50, 50] | 1.2 |"
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
