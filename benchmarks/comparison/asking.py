"""How facts are asked where the user does not say: read off the tokenizer, before the weights."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from transformers import AutoTokenizer

from hiedit_env.datasets.difficulty import is_world
from hiedit_env.envs.settings import AskingSettings
from hiedit_env.errors import SettingsError
from hiedit_env.model.asking import end_of_turn
from hiedit_env.model.built_in import built_in
from hiedit_env.model.loading import load_model
from hiedit_env.model.relatives import known_as
from hiedit_env.model.saving import find_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

S = TypeVar("S", bound=AskingSettings)


def settle_asking(settings: S, *, both: bool = False, in_chat: bool = False) -> S:
    """Settings with the form of the prompts and the end token filled in.

    Where nothing is given, the form is plain, and the end token is put behind answers, except for
    the toy models, worlds made on demand among them, and where the tokenizer has none.

    Args:
        settings: Which model, and what was given.
        both: Whether the form is "both" where nothing is given and there is a chat template.
        in_chat: Whether a chat template is needed whatever the form.

    Raises:
        SettingsError: a tokenizer without the chat template or the end token that is asked for; the
            weights have not been read yet.
        ModelError: no such model.
    """
    form, end = settings.prompt_form, settings.end_token
    # The models of worlds made on demand have single answers to give, and no end after them.
    toy = is_world(settings.model) or built_in(known_as(settings.model)).shipped
    if end is None and toy:
        end = False
    if form is None and not both:
        form = "plain"
    if form is None or form != "plain" or end is not False or in_chat:
        tokenizer = _tokenizer(settings)
        has_template = bool(getattr(tokenizer, "chat_template", None))
        has_end = end_of_turn(tokenizer) is not None
        if form is None:
            form = "both" if has_template else "plain"
        if (form != "plain" or in_chat) and not has_template:
            asked = "--ask-in-chat" if form == "plain" else f"--prompt-form {form}"
            raise SettingsError(
                f"{asked} needs a chat template, and the tokenizer of {settings.model!r} has none; "
                "leave it out, or use an instruct model"
            )
        if end and not has_end:
            raise SettingsError(
                f"--end-token needs an end token, and the tokenizer of {settings.model!r} has "
                "none; give --no-end-token"
            )
        end = has_end if end is None else end
    return replace(settings, prompt_form=form, end_token=end)


def _tokenizer(settings: AskingSettings) -> PreTrainedTokenizerBase:
    """The model's tokenizer; a model that is not on this machine yet is fetched first."""
    folder = find_folder(settings.model)
    if folder is not None:
        try:
            found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=settings.trust_remote_code, local_files_only=True
            )
        # Whatever is wrong with a folder, load_model says it in one line.
        except Exception:
            folder = None
        else:
            return found
    return load_model(
        settings.model,
        trust_remote_code=settings.trust_remote_code,
        layers=settings.layers,
        memory=settings.memory_check,
    ).tokenizer
