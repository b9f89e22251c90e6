"""The server in this process: what it answers, what it writes, what it refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient

from hiedit_agents.serving.served_model import ServedModel
from tests.support.editors import FACTS
from tests.support.served import RIGHT, TEMPLATE, asked, completion, served

FACT = {"prompt": FACTS[0].prompt, "answer": FACTS[0].answer}


@pytest.fixture(scope="module")
def unedited() -> Iterator[TestClient]:
    """Nobody edits this one, so tests share it."""
    with asked(served(), max_bytes=2000) as client:
        yield client


@pytest.fixture
def model() -> ServedModel:
    return served()


def refused(client: TestClient, status: int, method: str, path: str, **more: Any) -> str:
    """The message of an error, whose shape is checked."""
    response = client.request(method, path, **more)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]
    return str(error["message"])


# -- editing and asking ----------------------------------------------------------------------------


def test_an_edit_is_answered_listed_and_taken_back(model: ServedModel) -> None:
    editor = model._editor
    [was] = editor.ask(FACT["prompt"], max_new_tokens=8)
    with asked(model) as client:
        assert completion(client, FACT["prompt"]) == was
        first = client.get("/v1/models").json()["data"]
        assert [(m["id"], m["edits"], m["chats"]) for m in first] == [
            ("tiny", 0, False),
            ("tiny:unedited", 0, False),
        ]
        assert first[0]["fingerprint"] == first[1]["fingerprint"]

        done = client.post("/edits", json=FACT, headers=RIGHT).json()
        [result] = done["data"]
        assert (result["status"], result["id"], result["before"]) == (
            "written",
            1,
            {"plain": was[: len(result["before"]["plain"])]},
        )
        [now] = editor.ask(FACT["prompt"], max_new_tokens=8)
        assert now.strip().startswith(FACT["answer"])
        assert not was.strip().startswith(FACT["answer"])
        assert completion(client, FACT["prompt"]) == now
        assert completion(client, FACT["prompt"], "tiny:unedited") == was
        after = client.get("/v1/models/tiny").json()
        assert (after["edits"], after["fingerprint"]) == (1, done["fingerprint"])
        assert done["fingerprint"] == editor.llm.weights_fingerprint() != first[0]["fingerprint"]

        [entry] = client.get("/edits", headers=RIGHT).json()["data"]
        assert (entry["id"], entry["in_place"]) == (1, True)
        assert entry["facts"][0]["request"]["answer"] == FACT["answer"]

        gone = client.delete("/edits/1", headers=RIGHT).json()
        assert (gone["deleted"], gone["event"]) == (True, 2)
        assert gone["fingerprint"] == first[0]["fingerprint"]
        assert completion(client, FACT["prompt"]) == was
        assert client.get("/edits", headers=RIGHT).json()["data"] == []
        assert client.get("/edits/1", headers=RIGHT).json()["in_place"] is False


def test_several_facts_at_once_and_pages_of_the_list(model: ServedModel) -> None:
    facts = [{"prompt": f.prompt, "answer": f.answer} for f in FACTS[:4]]
    with asked(model) as client:
        body = {"facts": facts, "together": 2}
        done = client.post("/edits", json=body, headers=RIGHT).json()["data"]
        assert [result["id"] for result in done] == [1, 1, 2, 2]
        model.edit(FACTS[4])
        page = client.get("/edits", params={"limit": 2}, headers=RIGHT).json()
        assert ([e["id"] for e in page["data"]], page["has_more"], page["total"]) == (
            [3, 2],
            True,
            3,
        )
        rest = client.get("/edits", params={"before": 2}, headers=RIGHT).json()
        assert ([e["id"] for e in rest["data"]], rest["has_more"]) == ([1], False)


def test_a_known_fact_and_one_that_cannot_be_read(model: ServedModel) -> None:
    with asked(model) as client:
        client.post("/edits", json=FACT, headers=RIGHT)
        [again] = client.post("/edits", json=FACT, headers=RIGHT).json()["data"]
        assert (again["status"], again["id"]) == ("known", None)
        wrong = {"json": {"prompt": "P"}, "headers": RIGHT}
        assert "answer" in refused(client, 400, "POST", "/edits", **wrong)
        long = {"json": {"prompt": "a " * 4000, "answer": "b"}, "headers": RIGHT}
        assert "context" in refused(client, 400, "POST", "/edits", **long)
        assert len(model._editor.ledger) == 1


def test_an_edit_goes_on_with_a_ledger(model: ServedModel, tmp_path: Any) -> None:
    first = served(ledger=tmp_path)
    with asked(first) as client:
        client.post("/edits", json=FACT, headers=RIGHT)
        wanted = completion(client, FACT["prompt"])
    first._editor.close()
    with asked(served(ledger=tmp_path)) as client:
        assert completion(client, FACT["prompt"]) == wanted
        assert [e["id"] for e in client.get("/edits", headers=RIGHT).json()["data"]] == [1]
        assert client.delete("/edits/1", headers=RIGHT).status_code == 200


# -- OpenAI's interface ----------------------------------------------------------------------------


def test_usage_and_why_an_answer_ended(unedited: TestClient) -> None:
    body = {"model": "tiny", "prompt": [FACT["prompt"], FACTS[1].prompt], "max_tokens": 2}
    reply = unedited.post("/v1/completions", json=body).json()
    assert reply["object"] == "text_completion"
    assert [choice["index"] for choice in reply["choices"]] == [0, 1]
    assert [choice["finish_reason"] for choice in reply["choices"]] == ["length", "length"]
    usage = reply["usage"]
    assert usage["completion_tokens"] == 4
    assert usage["total_tokens"] == usage["prompt_tokens"] + 4
    one, two = (
        unedited.post("/v1/completions", json={**body, "prompt": prompt}).json()
        for prompt in body["prompt"]
    )
    assert usage["prompt_tokens"] == sum(r["usage"]["prompt_tokens"] for r in (one, two))
    assert reply["choices"][1]["text"] == two["choices"][0]["text"]


def test_a_stop_text_ends_an_answer_and_is_left_out(unedited: TestClient) -> None:
    whole = completion(unedited, FACT["prompt"])
    stop = whole[4:6]
    body = {"model": "tiny", "prompt": FACT["prompt"], "max_tokens": 8, "stop": ["#", stop]}
    [choice] = unedited.post("/v1/completions", json=body).json()["choices"]
    assert choice["text"] == whole[: whole.index(stop)]
    assert choice["finish_reason"] == "stop"


def test_a_seed_draws_the_same_and_another_one_others(unedited: TestClient) -> None:
    hot = {"temperature": 2.0, "seed": 1}
    drawn = [completion(unedited, FACT["prompt"], **hot) for _ in range(2)]
    assert drawn[0] == drawn[1]
    others = {completion(unedited, FACT["prompt"], **{**hot, "seed": s}) for s in range(2, 6)}
    assert others - {drawn[0]}
    # Only the likeliest token has that little probability before it.
    cold = completion(unedited, FACT["prompt"], temperature=2.0, top_p=1e-6)
    assert (
        cold
        == completion(unedited, FACT["prompt"])
        == completion(unedited, FACT["prompt"], temperature=1e-30)
    )


def events(client: TestClient, path: str, body: dict[str, Any]) -> list[Any]:
    with client.stream("POST", path, json={**body, "stream": True}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        text = "".join(response.iter_text())
    parts = text.split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


def test_a_stream_gives_the_same_text(unedited: TestClient) -> None:
    body = {"model": "tiny", "prompt": FACT["prompt"], "max_tokens": 8}
    whole = unedited.post("/v1/completions", json=body).json()
    found = events(unedited, "/v1/completions", {**body, "stream_options": {"include_usage": True}})
    assert "".join(e["choices"][0]["text"] for e in found[:-1]) == whole["choices"][0]["text"]
    assert [e["choices"][0]["finish_reason"] for e in found[:-1]][-2:] == [None, "stop"]
    assert found[-1]["usage"] == whole["usage"]
    assert {e["system_fingerprint"] for e in found} == {whole["system_fingerprint"]}


def test_a_chat_is_what_the_template_writes() -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": FACT["prompt"]}]},
    ]
    plain = f"system: Be brief.\nuser: {FACT['prompt']}\nassistant:"
    with asked(served(template=TEMPLATE)) as client:
        body = {"model": "tiny", "messages": messages, "max_tokens": 6}
        reply = client.post("/v1/chat/completions", json=body).json()
        message = reply["choices"][0]["message"]
        assert reply["object"] == "chat.completion"
        assert message == {"role": "assistant", "content": completion(client, plain, max_tokens=6)}
        found = events(client, "/v1/chat/completions", body)
        assert found[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        text = "".join(e["choices"][0]["delta"].get("content", "") for e in found)
        assert text == message["content"]
        assert found[-1]["choices"][0]["delta"] == {}
        assert client.get("/v1/models").json()["data"][0]["chats"] is True


def test_a_model_without_a_chat_template_says_so(unedited: TestClient) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}]}
    text = refused(unedited, 400, "POST", "/v1/chat/completions", json=body)
    assert text == ("tiny has no chat template; use /v1/completions, or serve an instruct model")


# -- what is refused -------------------------------------------------------------------------------

PROMPT = {"model": "tiny", "prompt": "Belka lives in"}


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"model": "tiny"}, "prompt is missing; it must be a text, or a list of 1 to 64 texts"),
        ({**PROMPT, "prompt": []}, "prompt"),
        ({**PROMPT, "prompt": " "}, "prompt"),
        ({**PROMPT, "prompt": "a " * 400}, "leaves no room for an answer in the model's context"),
        ({**PROMPT, "temperature": -1}, "temperature must be a number from 0 to 2, got -1"),
        ({**PROMPT, "top_p": 0}, "top_p"),
        ({**PROMPT, "max_tokens": 0}, "max_tokens"),
        ({**PROMPT, "stop": ["x", ""]}, "stop"),
        ({**PROMPT, "n": 2}, "n can only be 1 here; leave it out"),
        ({**PROMPT, "logprobs": 5}, "logprobs can only be False here"),
        ({**PROMPT, "tempreature": 1}, "tempreature is not known here; leave it out"),
    ],
)
def test_what_is_not_done_is_named(unedited: TestClient, body: Any, says: str) -> None:
    assert says in refused(unedited, 400, "POST", "/v1/completions", json=body)


def test_fields_that_change_nothing_are_taken(unedited: TestClient) -> None:
    more = {"n": 1, "user": "me", "presence_penalty": 0.0, "logprobs": None, "metadata": {"a": "b"}}
    assert completion(unedited, "Belka lives in", **more)


def test_another_model_is_named(unedited: TestClient) -> None:
    body = {**PROMPT, "model": "gpt"}
    response = unedited.post("/v1/completions", json=body)
    assert response.status_code == 404
    error = response.json()["error"]
    assert error["code"] == "model_not_found"
    assert error["message"] == "this server has no model 'gpt'; it has 'tiny' and 'tiny:unedited'"
    assert "no model 'gpt'" in refused(unedited, 404, "GET", "/v1/models/gpt")


@pytest.mark.parametrize("header", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "ü"}])
def test_edits_need_the_token(model: ServedModel, header: dict[str, str]) -> None:
    header = {name: value.encode("latin-1") for name, value in header.items()}  # type: ignore[misc]
    with asked(model) as client:
        for method, path in (("POST", "/edits"), ("GET", "/edits"), ("DELETE", "/edits/1")):
            text = refused(client, 401, method, path, json=FACT, headers=header)
            assert "Authorization: Bearer TOKEN" in text
        assert len(model._editor.ledger) == 0
        assert client.get("/v1/models").status_code == 200
    with asked(model, ask_with_token=True) as client:
        assert refused(client, 401, "GET", "/v1/models", headers=header)
        assert refused(client, 401, "POST", "/v1/completions", json=PROMPT, headers=header)
        assert client.get("/v1/models", headers=RIGHT).status_code == 200


def test_ids_that_are_not_there(model: ServedModel) -> None:
    model.edit(FACTS[0])
    model.undo(1)
    with asked(model) as client:
        for id, says in (("7", "there is no edit 7"), ("2", "there is no edit 2")):
            assert says in refused(client, 404, "DELETE", f"/edits/{id}", headers=RIGHT)
            assert says in refused(client, 404, "GET", f"/edits/{id}", headers=RIGHT)
        text = refused(client, 404, "DELETE", "/edits/1", headers=RIGHT)
        assert "edit 1 is not in place any more" in text
        assert "id" in refused(client, 400, "DELETE", "/edits/one", headers=RIGHT)
        assert len(model._editor.ledger) == 2


def test_requests_have_a_size(unedited: TestClient) -> None:
    large = {**PROMPT, "prompt": "a" * 2000}
    said = refused(unedited, 413, "POST", "/v1/completions", json=large)
    assert said == "a request may have 2000 bytes; send less at once"
    chunks = {"content": iter([b" " * 1500] * 2), "headers": {"Content-Type": "application/json"}}
    assert refused(unedited, 413, "POST", "/v1/completions", **chunks) == said
    exact = json.dumps(PROMPT).encode().ljust(2000)
    sent = {"content": exact, "headers": {"Content-Type": "application/json"}}
    assert unedited.post("/v1/completions", **sent).status_code == 200


def test_other_hosts_broken_json_and_unknown_paths(model: ServedModel) -> None:
    with asked(model, hosts=["127.0.0.1"]) as client:
        text = refused(client, 421, "GET", "/v1/models", headers={"Host": "evil.example:80"})
        assert text == "this server is not 'evil.example'; ask 127.0.0.1"
        kind = {"Content-Type": "application/json"}
        for content in (b"{", b"[" * 100_000, b"\xff"):
            refused(client, 400, "POST", "/v1/completions", content=content, headers=kind)
        text = refused(client, 404, "GET", "/v2")
        assert text.startswith("there is nothing at '/v2'; there are GET /v1/models, ")
        text = refused(client, 405, "PUT", "/edits", headers=RIGHT)
        assert text == "'/edits' takes GET and POST, not PUT"


def test_a_failure_is_one_line_whole_or_streamed(
    model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(model, "answer", broken)
    with asked(model) as client:
        text = refused(client, 500, "POST", "/v1/completions", json=PROMPT)
        assert text == "the server failed: RuntimeError: out of memory; its log says where"
        body = {**PROMPT, "stream": True}
        answer = client.post("/v1/completions", json=body).text
        assert json.loads(answer.removeprefix("data: "))["error"]["message"] == text


def test_the_page_loads_nothing_from_elsewhere(unedited: TestClient) -> None:
    for path, kind in (("/", "html"), ("/page.css", "css"), ("/page.js", "javascript")):
        response = unedited.get(path)
        assert response.status_code == 200
        assert kind in response.headers["content-type"]
        assert "default-src 'self'" in response.headers["content-security-policy"]
        assert "http" not in response.text.replace("http-equiv", "")
