"""Clients that go away: nobody generates for them."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest

from hiedit_agents.serving.answering import Answered, Question
from hiedit_agents.serving.app import create_app
from hiedit_agents.serving.served_model import ServedModel
from tests.support.served import TOKEN, asked, completion, listening, served

LIMIT = 20


@pytest.fixture(scope="module")
def model() -> ServedModel:
    return served()


def endless(begun: threading.Event, ended: threading.Event) -> Callable[..., Answered]:
    """An answer that goes on until nobody waits for it."""

    def answer(_: Any, question: Question, send: Callable[[str], None]) -> Answered:
        send("a")
        begun.set()
        if question.gone.wait(LIMIT):
            ended.set()
        return Answered(1, "length")

    return answer


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_ends_when_its_client_goes_away(
    stream: bool, model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, ended = threading.Event(), threading.Event()
    monkeypatch.setattr(model, "answer", endless(begun, ended))
    body = json.dumps({"model": "tiny", "prompt": "Belka", "stream": stream}).encode()
    with listening(create_app(model, TOKEN)) as address:
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            head = (
                f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            )
            connection.sendall(head.encode() + body)
            assert begun.wait(LIMIT)
        assert ended.wait(LIMIT / 2)


def test_no_more_answers_at_once_than_asked_for(
    model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, most, count = 0, 0, 0
    lock = threading.Lock()

    def answer(_: Any, question: Question, send: Callable[[str], None]) -> Answered:
        nonlocal running, most, count
        with lock:
            running += 1
            most = max(most, running)
            count += 1
        threading.Event().wait(0.05)
        with lock:
            running -= 1
        return Answered(1, "length")

    monkeypatch.setattr(model, "answer", answer)
    with asked(model, answers_at_once=2) as client:
        body = {"model": "tiny", "prompt": ["Belka"] * 6, "max_tokens": 3}
        assert len(client.post("/v1/completions", json=body).json()["choices"]) == 6
    assert (most, count) == (2, 6)


def test_a_server_that_stops_answers_no_more(model: ServedModel) -> None:
    with asked(model) as client:
        before = completion(client, "Belka lives in")
    # Each server has workers of its own.
    with asked(model) as client:
        assert completion(client, "Belka lives in") == before
