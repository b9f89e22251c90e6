"""The resident model and the stream of facts that an environment's settings ask for."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hiedit_env.datasets.requests import Request
from hiedit_env.datasets.streams import stream
from hiedit_env.envs.settings import EnvSettings
from hiedit_env.errors import SettingsError
from hiedit_env.model.architectures import find_candidates
from hiedit_env.model.asking import end_of_turn
from hiedit_env.model.loading import load_model
from hiedit_env.model.relatives import known_as
from hiedit_env.resident.resident import ResidentLLM


def load_resident(settings: EnvSettings, requests: Sequence[Request]) -> ResidentLLM:
    """Loads the model, with its candidate layers and its end token.

    What a user should know about the model is printed to standard error, one line each.

    Args:
        settings: Of the environment.
        requests: Facts that may be edited, for the memory that their prompts need.

    Raises:
        ModelError, LayerError, DeviceError, NotEnoughMemoryError: as ``load_model`` and
            ``find_candidates`` raise them.
        SettingsError: the chat form or an end token of a tokenizer that has none.
    """
    loaded = load_model(
        settings.model,
        device=settings.device,
        dtype=settings.dtype,
        trust_remote_code=settings.trust_remote_code,
        progress=settings.progress,
        layers=settings.layers,
        requests=requests,
        memory=settings.memory_check,
    )
    if settings.prompt_form != "plain" and not getattr(loaded.tokenizer, "chat_template", None):
        raise SettingsError(
            f"prompt_form={settings.prompt_form!r} needs a chat template, and the tokenizer of "
            f"{settings.model!r} has none; set prompt_form='plain' or use an instruct model"
        )
    end = end_of_turn(loaded.tokenizer) if settings.end_token else None
    if settings.end_token and end is None:
        raise SettingsError(
            f"end_token=True needs an end token, and the tokenizer of {settings.model!r} has none; "
            "set end_token=False"
        )
    candidates = find_candidates(loaded.model, settings.layers, known_as(settings.model))
    llm = ResidentLLM(loaded.model, loaded.tokenizer, candidates, end_id=end)
    for note in llm.notes:
        print(f"hiedit: {note}", file=sys.stderr)
    return llm


def draw_stream(
    options: Mapping[str, Any] | None,
    requests: Sequence[Request],
    num_edits: int | None,
    generator: np.random.Generator | None,
) -> Sequence[Request]:
    """The facts of a new episode.

    Args:
        options: Options of ``reset``; ``requests`` replaces everything else.
        requests: The data set.
        num_edits: How many of them; None for all.
        generator: Draws them; None for the first ones in their order.

    Raises:
        SettingsError: another option than ``requests``, or one that is no list of Requests.
    """
    if not isinstance(options or {}, Mapping):
        raise SettingsError(f"reset options must be a dict or None, got {options!r:.200}")
    unknown = sorted(map(str, set(options or {}) - {"requests"}))
    if unknown:
        raise SettingsError(f"unknown reset options {unknown}; known is 'requests'")
    if options:
        given = options["requests"]
        if not isinstance(given, list | tuple) or not all(isinstance(r, Request) for r in given):
            raise SettingsError(f"requests must be a list of hiedit Requests, got {given!r:.200}")
        return given
    return requests[:num_edits] if generator is None else stream(requests, num_edits, generator)
