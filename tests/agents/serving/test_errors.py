"""What clients are told when a request is wrong: the field, its value, and what is right."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient

from hiedit_agents.serving import schema
from tests.support.served import RIGHT, TEMPLATE, asked, served

ASKED = {"model": "tiny", "prompt": "Belka lives in"}
PROMPTS = "a text, or a list of 1 to 64 texts, none of them empty (token ids are not read here)"
ONE_PROMPT = "a text that is not empty (token ids are not read here)"
STOPS = "a text, or a list of texts, none of them empty"
COMPLETION = '{"model": "NAME", "prompt": "TEXT"}'
PART = '{"type": "text", "text": "TEXT"}'
PATHS = (
    "GET /v1/models, GET /v1/models/{name}, POST /v1/completions, POST /v1/chat/completions, "
    "GET and POST /edits, GET and DELETE /edits/{id}, and the page at /"
)
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    """A server that nobody edits."""
    with asked(served(template=TEMPLATE)) as client:
        yield client


def told(
    client: TestClient, status: int, method: str, path: str, **more: Any
) -> tuple[str | None, str]:
    """Field and message of an error, whose shape is checked."""
    response = client.request(method, path, **more)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert all(c.isprintable() for c in error["message"])
    assert len(error["message"]) < 400
    return error["param"], error["message"]


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        (
            {"prompt": ["a"] * 65},
            "prompt",
            f"prompt must be {PROMPTS}, got a list of 65: ['a', 'a', 'a', 'a', 'a', 'a', 'a', 'a', "
            "'a', 'a', 'a', 'a'…",
        ),
        ({"prompt": []}, "prompt", f"prompt must be {PROMPTS}, got []"),
        ({"prompt": ""}, "prompt", f"prompt must be {PROMPTS}, got ''"),
        ({"prompt": 3}, "prompt", f"prompt must be {PROMPTS}, got 3"),
        ({"prompt": None}, "prompt", f"prompt must be {PROMPTS}, got None"),
        ({"prompt": ["a", ""]}, "prompt.1", f"prompt.1 must be {ONE_PROMPT}, got ''"),
        ({"prompt": [5, 6]}, "prompt.0", f"prompt.0 must be {ONE_PROMPT}, got 5"),
        ({"prompt": [[5], [6]]}, "prompt.0", f"prompt.0 must be {ONE_PROMPT}, got [5]"),
        ({"stop": ""}, "stop", f"stop must be {STOPS}, got ''"),
        ({"stop": ["x", ""]}, "stop.1", "stop.1 must be a text that is not empty, got ''"),
        ({"stop": {"\x1b[31m": 1}}, "stop", f"stop must be {STOPS}, got {{'\\x1b[31m': 1}}"),
        (
            {"temperature": "\x1b[31m\u202e" + "9" * 80},
            "temperature",
            "temperature must be a number from 0 to 2, got '\\x1b[31m\\u202e"
            "99999999999999999999999999999999999999999999…",
        ),
        ({"temperature": 3}, "temperature", "temperature must be a number from 0 to 2, got 3"),
        ({"top_p": 0}, "top_p", "top_p must be a number above 0 and at most 1, got 0"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens must be a whole number ≥ 1, got 0"),
        ({"seed": 2**63}, "seed", f"seed must be a whole number of 64 bits, got {2**63}"),
        ({"stream": "maybe"}, "stream", "stream must be true or false, got 'maybe'"),
        (
            {"stream_options": {"include_usage": "z"}},
            "stream_options.include_usage",
            "stream_options.include_usage must be true or false, got 'z'",
        ),
        (
            {"model": ""},
            "model",
            "model must be the name of a model, as GET /v1/models lists them, got ''",
        ),
        (
            {"temperature": 3, "prompt": []},
            "temperature",
            "temperature must be a number from 0 to 2, got 3; 1 other field is wrong too",
        ),
        (
            {"temperature": 3, "prompt": [], "stop": ["", ""]},
            "temperature",
            "temperature must be a number from 0 to 2, got 3; 2 other fields are wrong too",
        ),
        ({"n": 2}, None, "n can only be 1 here; leave it out (got 2)"),
        (
            {"echo": "\x1b" * 99},
            None,
            "echo can only be False here; leave it out (got '" + "\\x1b" * 14 + "\\x…)",
        ),
        ({"a\x1b[31m\n\u202e": 1}, None, "'a\\x1b[31m\\n\\u202e' is not known here; leave it out"),
    ],
)
def test_a_field_is_named_with_its_value_and_what_is_right(
    client: TestClient, body: Any, param: str | None, says: str
) -> None:
    found = told(client, 400, "POST", "/v1/completions", json={**ASKED, **body})
    assert found == (param, says)


def test_half_of_a_surrogate_pair(client: TestClient) -> None:
    for content, place in (
        (b'{"model": "tiny", "prompt": "a\\ud800"}', "prompt"),
        (b'{"model": "tiny", "prompt": ["a\\ud800"]}', "prompt.0"),
    ):
        found = told(client, 400, "POST", "/v1/completions", content=content, headers=JSON)
        assert found == (
            place,
            f"{place} must be without halves of surrogate pairs, got 'a\\ud800'",
        )
    for path, body, says in (
        (
            "/v1/completions",
            b'{"model": "tiny", "prompt": "a", ',
            "is not known here; leave it out",
        ),
        ("/edits", b'{"facts": [{}], ', "is not known here; leave it out"),
        ("/edits", b'{"prompt": "a", "answer": "b", ', "is unknown; format 'facts' has prompt"),
    ):
        content, headers = body + b'"\\ud800": 1}', {**JSON, **RIGHT}
        _, text = told(client, 400, "POST", path, content=content, headers=headers)
        assert f"'\\ud800' {says}" in text


@pytest.mark.parametrize(
    ("message", "place", "says"),
    [
        ({"role": "user"}, "content", "is missing; it must be a text, or a list of parts"),
        ({"role": "tool", "content": "x"}, "role", "system, developer, user or assistant, got 't"),
        ({"role": "user", "content": 3}, "content", "must be a text, or a list of parts such as"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {}}]},
            "content.0.type",
            "must be 'text', the only kind that is read, got 'image_url'",
        ),
        (
            {"role": "user", "content": [7]},
            "content.0",
            f"must be an object such as {PART}, got 7",
        ),
    ],
)
def test_a_message_that_is_wrong(client: TestClient, message: Any, place: str, says: str) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}, message]}
    param, text = told(client, 400, "POST", "/v1/chat/completions", json=body)
    assert param == f"messages.1.{place}"
    assert text.startswith(f"messages.1.{place} ")
    assert says in text


def test_what_is_missing(client: TestClient) -> None:
    assert told(client, 400, "POST", "/v1/completions", json={"model": "tiny"}) == (
        "prompt",
        f"prompt is missing; it must be {PROMPTS}",
    )
    assert told(client, 400, "POST", "/v1/chat/completions", json={"model": "tiny"}) == (
        "messages",
        "messages is missing; it must be a list of messages, at least one, each such as "
        '{"role": "user", "content": "TEXT"}',
    )


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", f"the body is empty; send a JSON object such as {COMPLETION}"),
        (b"null", f"the body is empty; send a JSON object such as {COMPLETION}"),
        (b"[]", f"the body must be a JSON object such as {COMPLETION}, got []"),
        (b'"\\u001b"', f"the body must be a JSON object such as {COMPLETION}, got '\\x1b'"),
        (
            b"{",
            "the body is no JSON: Expecting property name enclosed in double quotes at its end "
            f"(character 1); send an object such as {COMPLETION}",
        ),
        (
            b'{"model": \x1b[31m}',
            "the body is no JSON: Expecting value at character 10, got '\\x1b[31m}'; send an "
            f"object such as {COMPLETION}",
        ),
        (b"\xff", "the body is not in UTF-8: 'utf-8' codec can't decode byte 0xff in position 0"),
        (b"[" * 100_000, "the body is nested too deeply"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "the body cannot be read: Exceeds the limit (4300 dig"),
    ],
)
def test_a_body_that_is_no_object(client: TestClient, content: bytes, says: str) -> None:
    param, text = told(client, 400, "POST", "/v1/completions", content=content, headers=JSON)
    assert param is None
    assert text.startswith(says)
    assert text.endswith(f"send a JSON object such as {COMPLETION}") or says == text


def test_a_body_of_another_kind(client: TestClient) -> None:
    headers = {"Content-Type": "text/\x1b[31mplain"}
    for given, shown in ((headers, "'text/\\x1b[31mplain'"), ({}, "none")):
        found = told(client, 400, "POST", "/v1/completions", content=b"{}", headers=given)
        assert found == (
            None,
            f"the body needs the header 'Content-Type: application/json', got {shown}",
        )


def test_any_depth_is_one_line(client: TestClient) -> None:
    for depth in range(500, 1000, 7):
        content = b'{"model": "tiny", "prompt": ' + b"[" * depth + b"]" * depth + b"}"
        told(client, 400, "POST", "/v1/completions", content=content, headers=JSON)


@pytest.mark.parametrize(
    ("method", "path", "body", "says"),
    [
        ("POST", "/edits", {"facts": []}, "facts must be a list of 1 to 256 facts, got []"),
        ("POST", "/edits", {"facts": [{}] * 257}, "facts must be a list of 1 to 256 facts, got a "),
        (
            "POST",
            "/edits",
            {"facts": [3]},
            'facts.0 must be an object such as {"prompt": "TEXT", "answer": "TEXT"}, got 3',
        ),
        (
            "POST",
            "/edits",
            {"facts": [{}], "together": 0},
            "together must be a whole number ≥ 1, got 0",
        ),
        ("POST", "/edits", {"facts": [{}], "x\x1b": 1}, "'x\\x1b' is not known here; leave it out"),
        ("POST", "/edits", None, "the body is empty; send a JSON object such as {"),
        ("GET", "/edits?limit=0", None, "limit must be a whole number from 1 to 1000, got '0'"),
        ("GET", "/edits?before=x%1b", None, "before must be a whole number ≥ 1, got 'x\\x1b'"),
        ("GET", "/edits/%1b", None, "id must be the number of an edit, got '\\x1b'"),
        ("DELETE", "/edits/one", None, "id must be the number of an edit, got 'one'"),
    ],
)
def test_requests_about_edits(
    client: TestClient, method: str, path: str, body: Any, says: str
) -> None:
    _, text = told(client, 400, method, path, json=body, headers=RIGHT)
    assert text.startswith(says)


def test_every_field_has_words() -> None:
    kinds = (
        schema.CompletionRequest,
        schema.ChatRequest,
        schema.Message,
        schema.TextPart,
        schema.StreamOptions,
        schema.EditsRequest,
    )
    names = {name for kind in kinds for name in kind.model_fields}
    assert schema.ALLOWED.keys() == names | {"limit", "before", "id"}


def test_an_unknown_path_is_named_with_those_there_are(client: TestClient) -> None:
    for path, shown in (("/completions", "'/completions'"), ("/v1/%1b%0a", "'/v1/\\x1b\\n'")):
        _, text = told(client, 404, "POST", path, json=ASKED)
        assert text == f"there is nothing at {shown}; there are {PATHS}"
    _, text = told(client, 404, "GET", "/has no model" + "x" * 300)
    assert text.startswith("there is nothing at '/has no modelxxxx")
    assert client.get("/has no model").json()["error"]["code"] is None


@pytest.mark.parametrize(
    ("method", "path", "says"),
    [
        ("PUT", "/edits", "'/edits' takes GET and POST, not PUT"),
        ("POST", "/edits/7", "'/edits/7' takes GET and DELETE, not POST"),
        ("GET", "/v1/completions", "'/v1/completions' takes POST, not GET"),
        ("POST", "/", "'/' takes GET, not POST"),
    ],
)
def test_another_method_is_named_with_the_right_ones(
    client: TestClient, method: str, path: str, says: str
) -> None:
    assert told(client, 405, method, path, headers=RIGHT) == (None, says)


def test_long_names_are_shortened(client: TestClient) -> None:
    _, text = told(client, 404, "POST", "/v1/completions", json={**ASKED, "model": "\x1b" * 500})
    assert text.startswith("this server has no model '\\x1b\\x1b")
    with asked(served(), hosts=["127.0.0.1"]) as alone:
        host = {"Host": "e" * 500}
        _, text = told(alone, 421, "GET", "/v1/models", headers=host)
        assert text.endswith("…; ask 127.0.0.1")


def test_the_description_needs_the_token_where_questions_do(client: TestClient) -> None:
    assert "/v1/models" in client.get("/openapi.json").json()["paths"]
    with asked(served(), ask_with_token=True) as guarded:
        _, text = told(guarded, 401, "GET", "/openapi.json")
        assert text.startswith("a token is needed")
        known = guarded.get("/openapi.json", headers=RIGHT).json()
        assert known == client.get("/openapi.json").json()
        for path in ("/docs", "/redoc"):
            told(guarded, 404, "GET", path)
