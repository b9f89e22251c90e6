"""What an editor is made with and asked, checked before anything is run or changed."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, cast, get_args

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from hiedit_agents.editing.checks import Checks
from hiedit_agents.editing.controls import has_template
from hiedit_env.datasets.requests import Request
from hiedit_env.errors import SettingsError, shown, whole_number
from hiedit_env.model.asking import PromptForm


def require_model(model: object, tokenizer: object) -> None:
    """Checks that there are a model and a tokenizer.

    Raises:
        SettingsError: something else.
    """
    if not isinstance(model, torch.nn.Module) or not hasattr(model, "config"):
        raise SettingsError(
            f"model must be a causal language model of transformers, got {shown(model)}; "
            "Editor.from_pretrained takes a name or a folder"
        )
    if not callable(tokenizer):
        raise SettingsError(f"tokenizer must be the model's tokenizer, got {shown(tokenizer)}")


def require_settings(
    agent: object,
    checks: object,
    earlier: object,
    end_token: object,
    numbers: tuple[object, object],
    seed: object,
) -> None:
    """Checks the other settings of an editor.

    Args:
        agent: A name, or None.
        checks: :class:`.checks.Checks`, or None.
        earlier: Requests.
        end_token: A bool, or None.
        numbers: ``layers_per_edit`` and ``max_steps_per_edit``, whole numbers or None.
        seed: A whole number.

    Raises:
        SettingsError: one of them is something else; says which.
    """
    if not isinstance(agent, str | None):
        raise SettingsError(f"agent must be a name, got {shown(agent)}")
    if not isinstance(checks, Checks | None):
        raise SettingsError(f"checks must be Checks(…) of hiedit_agents, got {shown(checks)}")
    if not isinstance(earlier, Collection) or not all(isinstance(r, Request) for r in earlier):
        raise SettingsError(f"earlier must be a list of Requests, got {shown(earlier)}")
    if not isinstance(end_token, bool | np.bool_ | None):
        raise SettingsError(f"end_token must be True, False or None, got {shown(end_token)}")
    for name, value in zip(("layers_per_edit", "max_steps_per_edit"), numbers, strict=True):
        if value is not None:
            whole_number(value, name, 1)
    whole_number(seed, "seed", 0)


def form_for(tokenizer: PreTrainedTokenizerBase, form: PromptForm | None) -> PromptForm:
    """The form in which facts are edited and asked.

    Args:
        tokenizer: The model's.
        form: The wanted one; None for both where there is a chat template, else plain.

    Raises:
        SettingsError: an unknown form, or chat without a template.
    """
    if form is not None and form not in get_args(PromptForm):
        raise SettingsError(
            f"prompt_form must be one of {', '.join(get_args(PromptForm))}, got {shown(form)}"
        )
    found: PromptForm = form or ("both" if has_template(tokenizer) else "plain")
    if found != "plain" and not has_template(tokenizer):
        raise SettingsError(
            f"prompt_form={found!r} needs a chat template, and the tokenizer has none; use "
            "'plain', or an instruct model"
        )
    return found


def texts_of(prompts: object) -> list[str]:
    """One or several prompts as a list.

    Raises:
        SettingsError: something that is no text.
    """
    several = isinstance(prompts, Iterable) and not isinstance(prompts, str)
    found: list[Any] = list(cast(Iterable[Any], prompts)) if several else [prompts]
    if not all(isinstance(text, str) for text in found):
        raise SettingsError(f"prompts must be a text or a list of texts, got {shown(prompts)}")
    return found


def require_float32_default() -> None:
    """Checks that new tensors are float32, as everything that edits takes for granted.

    Raises:
        SettingsError: ``torch.set_default_dtype`` was called with another type.
    """
    found = torch.get_default_dtype()
    if found != torch.float32:
        raise SettingsError(
            f"torch's default dtype is {str(found).removeprefix('torch.')}; call "
            "torch.set_default_dtype(torch.float32) first: the model keeps its own dtype"
        )


def refuse_nesting(at_work: bool) -> None:
    """Checks that an editor is not called from within one of its calls.

    Raises:
        SettingsError: it is.
    """
    if at_work:
        raise SettingsError("the editor is at work; call this when edit has returned")
