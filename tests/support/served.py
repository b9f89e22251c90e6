"""Servers on tiny models: in this process, and one that listens for real."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.testclient import TestClient

from hiedit_agents import Editor
from hiedit_agents.serving.app import create_app
from hiedit_agents.serving.run import address_of, take_port
from hiedit_agents.serving.served_model import ServedModel
from tests.support.editors import NONE, live

TOKEN = "right-token"
RIGHT = {"Authorization": f"Bearer {TOKEN}"}
#: What a chat template of a toy looks like: the user's words, then where the answer begins.
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


def served(*, template: str | None = None, **settings: Any) -> ServedModel:
    """A served tiny model, by the name "tiny"."""
    model, tokenizer = live()
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    given = {"checks": NONE, "name": "tiny", "prompt_form": "plain", **settings}
    return ServedModel(Editor(model, tokenizer, **given), "tiny")


@contextmanager
def asked(model: ServedModel, **settings: Any) -> Iterator[TestClient]:
    """A client of a server in this process."""
    app = create_app(model, TOKEN, **settings)
    with TestClient(app, "http://127.0.0.1", raise_server_exceptions=False) as client:
        yield client


@contextmanager
def listening(app: FastAPI) -> Iterator[str]:
    """A server that listens on a free port of this machine; yields its address."""
    taken = take_port("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="on"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]})
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield address_of("127.0.0.1", taken)
    finally:
        server.should_exit = True
        thread.join()
        taken.close()


def completion(client: TestClient, prompt: str, model: str = "tiny", **more: Any) -> str:
    """What a model says behind a prompt."""
    body = {"model": model, "prompt": prompt, "max_tokens": 8, **more}
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])
