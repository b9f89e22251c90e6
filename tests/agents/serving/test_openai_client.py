"""The server that listens for real, asked by the ``openai`` client."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from hiedit_agents.serving.app import create_app
from hiedit_agents.serving.run import address_of, take_port
from hiedit_agents.serving.served_model import ServedModel
from hiedit_env.errors import SettingsError
from tests.support.editors import FACTS
from tests.support.served import TEMPLATE, TOKEN, listening, served

openai = pytest.importorskip("openai")
PROMPT = FACTS[0].prompt


@pytest.fixture(scope="module")
def model() -> ServedModel:
    model = served(template=TEMPLATE)
    model.edit(FACTS[0])
    return model


@pytest.fixture(scope="module")
def client(model: ServedModel) -> Iterator[openai.OpenAI]:
    with listening(create_app(model, TOKEN)) as address:
        yield openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0)


def test_models(client: openai.OpenAI) -> None:
    assert [m.id for m in client.models.list()] == ["tiny", "tiny:unedited"]
    assert client.models.retrieve("tiny:unedited").owned_by == "hiedit"


def test_a_completion_whole_and_streamed(client: openai.OpenAI, model: ServedModel) -> None:
    [wanted] = model._editor.ask(PROMPT, max_new_tokens=8)
    assert wanted.strip().startswith(FACTS[0].answer)
    whole = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=8, temperature=0)
    assert whole.choices[0].text == wanted
    assert whole.system_fingerprint == model.present.fingerprint
    pieces = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=8, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == wanted
    other = client.completions.create(model="tiny:unedited", prompt=PROMPT, max_tokens=8)
    assert not other.choices[0].text.strip().startswith(FACTS[0].answer)


def test_a_chat_whole_and_streamed(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": PROMPT}]
    whole = client.chat.completions.create(model="tiny", messages=messages, max_tokens=6)
    assert whole.choices[0].message.role == "assistant"
    pieces = client.chat.completions.create(
        model="tiny",
        messages=messages,
        max_completion_tokens=6,
        stream=True,
        stream_options={"include_usage": True},
    )
    text, usage = "", None
    for piece in pieces:
        text += "".join(choice.delta.content or "" for choice in piece.choices)
        usage = piece.usage or usage
    assert text == whole.choices[0].message.content
    assert usage == whole.usage


def test_errors_are_the_clients_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="has no model 'gpt'") as caught:
        client.completions.create(model="gpt", prompt=PROMPT)
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="n can only be 1 here"):
        client.completions.create(model="tiny", prompt=PROMPT, n=2)
    with pytest.raises(openai.AuthenticationError, match="the token is wrong"):
        client.get("/../edits", cast_to=object)


def test_the_token_edits_through_the_client(model: ServedModel) -> None:
    with listening(create_app(model, TOKEN)) as address:
        client = openai.OpenAI(base_url=address, api_key=TOKEN, max_retries=0)
        fact = {"prompt": FACTS[1].prompt, "answer": FACTS[1].answer}
        done = client.post("/edits", body=fact, cast_to=dict)
        [result] = done["data"]
        assert result["status"] == "written"
        assert client.delete(f"/edits/{result['id']}", cast_to=dict)["deleted"] is True


def test_a_port_in_use_and_a_host_that_is_not_here() -> None:
    with take_port("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert address_of("127.0.0.1", taken) == f"http://127.0.0.1:{port}"
        with pytest.raises(SettingsError, match=f"port {port} of 127.0.0.1 cannot be used") as e:
            take_port("127.0.0.1", port)
        assert "give another --port, or 0" in str(e.value)
    with take_port("127.0.0.1", port):
        pass
    with pytest.raises(SettingsError, match="give another --host"):
        take_port("no.such.host.invalid", 0)


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6")
def test_an_address_of_the_newer_kind() -> None:
    try:
        taken = take_port("::1", 0)
    except SettingsError:
        pytest.skip("this machine has no ::1")
    with taken:
        assert address_of("::1", taken) == f"http://[::1]:{taken.getsockname()[1]}"
