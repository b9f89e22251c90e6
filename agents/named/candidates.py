"""The candidate layers for agents to act on: those that trained ones were trained for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from hiedit_agents.protocol import Agent
from hiedit_env.errors import CheckpointError, LayerError, SettingsError


@contextmanager
def candidates_for(
    agents: Sequence[Agent], model: str, given: Sequence[str] | None
) -> Iterator[tuple[str, ...] | None]:
    """Layers for the environment that is made within.

    Args:
        agents: Who acts on it.
        model: Name of its model.
        given: Layers that were asked for; None for those that the agents were trained for.

    Yields:
        Layer patterns, or None for the model's own candidates.

    Raises:
        SettingsError: the agents were trained for different layers.
        CheckpointError: the model lacks the layers that an agent was trained for; raised where the
            environment raises :class:`~hiedit_env.errors.LayerError`.
    """
    if given is not None:
        yield tuple(given)
        return
    wanted: dict[tuple[str, ...], str] = {}
    for agent in agents:
        find = getattr(agent, "candidate_layers", None)
        layers = None if find is None else find(model)
        if layers is not None:
            wanted.setdefault(tuple(layers), agent.name)
    if len(wanted) > 1:
        raise SettingsError(
            f"agents {' and '.join(wanted.values())} were trained for different candidate layers, "
            "so they cannot share a table; compare them apart"
        )
    layers, name = next(iter(wanted.items()), (None, ""))
    try:
        yield layers
    except LayerError as error:
        if layers is None:
            raise
        raise CheckpointError(
            f"agent {name!r} was trained for a model with other layers than {model!r}: {error}. "
            "Use the model it was trained for, or train an agent for this one"
        ) from error
