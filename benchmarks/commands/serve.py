"""A model that is edited while it answers: ``hiedit serve``."""

from __future__ import annotations

import sys
from pathlib import Path

from hiedit_agents.editing.checks import Checks
from hiedit_agents.serving.app import create_app
from hiedit_agents.serving.guards import LOOPBACK
from hiedit_agents.serving.run import address_of, is_loopback, serve, take_port
from hiedit_agents.serving.served_model import UNEDITED, ServedModel
from hiedit_benchmarks.commands.live_editor import live_editor
from hiedit_benchmarks.commands.serve_settings import ServeSettings
from hiedit_benchmarks.comparison.settings import EditSettings


def main(
    settings: EditSettings, agent: str | None, end_token: bool | None, given: ServeSettings
) -> int:
    """Takes the port, loads the model, and serves until it is interrupted.

    Args:
        settings: The model and how it is edited.
        agent: Who edits; None for the default of :class:`~hiedit_agents.Editor`.
        end_token: As there.
        given: The rest.

    Returns:
        Exit status 0.

    Raises:
        SettingsError: a port in use, or a token that cannot be sent; nothing was loaded.
        LedgerError: the ledger is of another model; it is as it was.
        ModelError: the model cannot be loaded.
    """
    token, made = given.settled_token()
    with take_port(given.host, given.port) as taken:
        checks = Checks(min_agreement=given.min_agreement, max_lost=given.max_lost)
        editor = live_editor(settings, agent, end_token, given.ledger, checks)
        with editor:
            model = ServedModel(editor, model_name(settings.model))
            alone = is_loopback(given.host)
            app = create_app(
                model,
                token,
                ask_with_token=not alone,
                together=settings.edits_per_step,
                answers_at_once=given.answers_at_once,
                hosts={*LOOPBACK, given.host} if alone else None,
            )
            _tell(model, given, address_of(given.host, taken), token, made)
            serve(app, taken)
            kept = f"are in {given.ledger}" if given.ledger else "are lost; --ledger DIR keeps them"
            print(f"\nhiedit: stopped; {len(model.present.active)} edits {kept}", file=sys.stderr)
    return 0


def model_name(model: str) -> str:
    """By which a model is asked for: a hub id as it is, a folder by its last part.

    >>> model_name("smollm2-135m"), model_name("org/model")
    ('smollm2-135m', 'org/model')
    """
    folder = Path(model)
    return folder.resolve().name.replace(":", "-") if folder.is_dir() else model


def _tell(model: ServedModel, given: ServeSettings, address: str, token: str, made: bool) -> None:
    """Says where to ask, on standard output, once."""
    lines = [
        f"agent {model.agent}",
        f"{model.name} with {len(model.present.active)} edits; the unedited model is called "
        f"{model.name}{UNEDITED}",
        f"OpenAI's interface: {address}/v1",
        # Behind "#" it is not sent, and the page takes it out of the address.
        f"page: {address}/#token={token}" if made else f"page: {address}/",
    ]
    if made:
        lines.append(f"token for edits: {token}")
    if not is_loopback(given.host):
        lines.append("other machines reach this server, unencrypted; questions need the token too")
    if given.ledger is None:
        lines.append("edits are lost when it stops; --ledger DIR keeps them")
    print("\n".join(f"hiedit: {line}" for line in lines), flush=True)
