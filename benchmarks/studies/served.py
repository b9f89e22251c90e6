"""What serving costs: an answer through the server beside plain ``generate``, idle and in edits.

The same prompts are asked over HTTP on this machine and by transformers' own ``generate``, in turn,
for the same number of new tokens. Then they are asked while facts are written without a pause.
Prints JSON::

    python -m hiedit_benchmarks.studies.served --model smollm2-135m --repeats 11
"""

from __future__ import annotations

import http.client
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any, TypeVar, cast

import torch
import uvicorn

from hiedit_agents.command_line import parse, run_script
from hiedit_agents.editing.checks import Checks
from hiedit_agents.editing.editor import Editor
from hiedit_agents.serving.app import create_app
from hiedit_agents.serving.run import take_port
from hiedit_agents.serving.served_model import ServedModel
from hiedit_agents.serving.snapshots import present_snapshot
from hiedit_env.datasets.load import load_requests
from hiedit_env.datasets.requests import Request
from hiedit_env.envs.settings import AtLeast1, settings
from hiedit_env.model.relatives import belongings

T = TypeVar("T")
PROGRAM = "python -m hiedit_benchmarks.studies.served"
_TOKEN = "study"


@settings
class Options:
    """What is asked."""

    model: str = "tiny"
    """the model that is served"""
    tokens: AtLeast1 = 24
    """new tokens of an answer"""
    repeats: AtLeast1 = 21
    """answers of each kind, each to another prompt"""


def cost(ask: Callable[[str], object], prompt: str) -> tuple[float, float]:
    """Milliseconds of a question: on the clock, and of the processor (client and server)."""
    start, used = time.perf_counter(), time.process_time()
    ask(prompt)
    return 1000 * (time.perf_counter() - start), 1000 * (time.process_time() - used)


@contextmanager
def listening(model: ServedModel) -> Iterator[Callable[[str, Any], Any]]:
    """A server on a free port; yields a function that posts JSON to a path of it."""
    with take_port("127.0.0.1", 0) as taken:
        config = uvicorn.Config(create_app(model, _TOKEN), log_level="error", lifespan="on")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]})
        thread.start()
        while not server.started and thread.is_alive():
            time.sleep(0.01)

        def post(path: str, body: Any) -> Any:
            # Each question on a connection of its own: an idle one is closed after some seconds.
            connection = http.client.HTTPConnection("127.0.0.1", taken.getsockname()[1])
            headers = {"Content-Type": "application/json"}
            connection.request("POST", path, json.dumps(body), headers)
            response = connection.getresponse()
            reply = json.load(response)
            connection.close()
            if response.status != 200:
                raise RuntimeError(reply["error"]["message"])
            return reply

        try:
            yield post
        finally:
            server.should_exit = True
            thread.join()


def measure(given: Options) -> dict[str, Any]:
    """Medians over answers by ``generate``, by an idle server, and by one that edits."""
    facts = load_requests(belongings(given.model).dataset)
    prompts = [facts[i % len(facts)].prompt for i in range(given.repeats)]
    with Editor.from_pretrained(given.model, checks=Checks(min_agreement=None)) as editor:
        # End tokens would make answers shorter than others.
        model = ServedModel(editor, given.model, ends=frozenset())
        model.edit(facts[0])
        plain = cast(Any, model.present.model)
        tokenizer = cast(Any, editor.tokenizer)

        def generate(prompt: str) -> str:
            ids = torch.tensor([editor.llm.encoder.encode_prompt(prompt)])
            with torch.inference_mode():
                out = plain.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=False,
                    max_new_tokens=given.tokens,
                    pad_token_id=0,
                    eos_token_id=None,
                )
            return str(tokenizer.decode(out[0, ids.shape[1] :]))

        with listening(model) as post:

            def ask(prompt: str) -> None:
                body = {"model": given.model, "prompt": prompt, "max_tokens": given.tokens}
                new = post("/v1/completions", body)["usage"]["completion_tokens"]
                assert new == given.tokens

            ask(prompts[0])
            generate(prompts[0])
            # In turn, so that both meet the same load of the machine.
            pairs = [(cost(generate, prompt), cost(ask, prompt)) for prompt in prompts]
            busy, written = _while_editing(
                model, facts[1:], lambda: [cost(ask, prompt)[0] for prompt in prompts]
            )
        start = time.perf_counter()
        present_snapshot(editor.llm, editor.ledger.active, model.unedited)
        exchange = 1000 * (time.perf_counter() - start)
    return {
        "model": given.model,
        "tokens": given.tokens,
        "answers": given.repeats,
        "generate_ms": median(own[0] for own, _ in pairs),
        "served_ms": median(served[0] for _, served in pairs),
        "ratio": median(served[0] / own[0] for own, served in pairs),
        "ratio_of_processor_time": median(served[1] / own[1] for own, served in pairs),
        "served_while_editing_ms": median(busy),
        "facts_written_meanwhile": written,
        "new_snapshot_ms": exchange,
        "threads": torch.get_num_threads(),
    }


def _while_editing(
    model: ServedModel, facts: Sequence[Request], work: Callable[[], T]
) -> tuple[T, int]:
    """Runs something while facts are written one after another; its result, and how many were."""
    stop = threading.Event()
    written = 0

    def edit() -> None:
        nonlocal written
        while not stop.is_set():
            for fact in facts:
                if stop.is_set():
                    return
                model.edit(fact)
                written += 1

    thread = threading.Thread(target=edit)
    thread.start()
    try:
        return work(), written
    finally:
        stop.set()
        thread.join()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the measurement and prints it as JSON; returns 0."""
    print(json.dumps(measure(parse(Options, arguments, program=PROGRAM)), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
