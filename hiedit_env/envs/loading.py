"""The resident model that an environment's settings ask for."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from hiedit_env.datasets.requests import Request, longest_prompt
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
        tokens=longest_prompt(requests),
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
