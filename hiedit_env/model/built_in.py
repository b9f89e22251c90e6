"""One table of the built-in models: environment, data set, update rule, layers, trained agent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from hiedit_env.datasets.difficulty import WorldName, is_world

#: The environment of models whose right layers nobody knows.
LAYER_SELECTION = "LayerSelection"
#: The environment of the planted model, which knows the right layers.
PLANTED = "Planted"


@dataclass(frozen=True, slots=True)
class BuiltIn:
    """What belongs to one model.

    Args:
        dataset: Its facts, where no data set is named.
        environment: The environment in which its agents are compared; the id is
            ``hiedit/NAME-v1`` with this name.
        facts: How the names of the data sets that this environment is for begin; empty for any
            data set.
        rule: The update rule that it is edited with, where none is named.
        rule_settings: Settings of update rules that were tuned for it: rule, then name, then value.
        layers: Candidate layers: matrix of the MLP, first block, last block.
        agent: The trained agent that ships for it, or the simple one that stands in.
        shipped: Whether its weights are files of this package.
    """

    dataset: str = "world-facts"
    environment: str = LAYER_SELECTION
    facts: str = ""
    rule: str = "decorrelated"
    rule_settings: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    layers: tuple[tuple[str, int, int], ...] = ()
    agent: str = "all-layers"
    shipped: bool = False


#: Name of a model → what belongs to it.
BUILT_IN: Mapping[str, BuiltIn] = MappingProxyType(
    {
        "tiny": BuiltIn(
            dataset="tiny-facts",
            rule_settings={
                "decorrelated": {"step_size": 1e-3},
                "outer-product": {"step_size": 2e-3},
                "ridge": {"step_size": 5e-4},
                "gradient": {"step_size": 0.03},
            },
            layers=(("gate_proj", 1, 2), ("up_proj", 1, 2), ("down_proj", 1, 2)),
            shipped=True,
        ),
        "planted": BuiltIn(
            dataset="planted-facts",
            environment=PLANTED,
            facts="planted-facts",
            rule="gradient",
            rule_settings={
                "decorrelated": {"step_size": 0.01},
                "outer-product": {"step_size": 0.01},
                "gradient": {"step_size": 1.5, "max_grad_norm": 4.0},
            },
            layers=(("down_proj", 1, 6),),
            agent="hiedit",
            shipped=True,
        ),
        "smollm2-135m": BuiltIn(
            layers=(("gate_proj", 10, 14), ("up_proj", 17, 23)),
            agent="hiedit",
        ),
    }
)
_ANY_OTHER = BuiltIn()


def built_in(model: object) -> BuiltIn:
    """What belongs to a model of this name; the defaults of every other model where there is none.

    :func:`.relatives.belongings` also knows folders.

    Raises:
        SettingsError: the name begins like that of a planted world, and there is no such world.

    >>> built_in("planted").rule, built_in("my/model").dataset
    ('gradient', 'world-facts')
    >>> built_in("planted:plain:3").dataset
    'planted:plain:3'
    """
    if is_world(model):
        return _world(str(model))
    return BUILT_IN.get(model, _ANY_OTHER) if isinstance(model, str) else _ANY_OTHER


def _world(model: str) -> BuiltIn:
    """What belongs to a planted world that is made on demand."""
    name = WorldName.read(model)
    return BuiltIn(
        dataset=str(name),
        environment=PLANTED,
        facts=str(name),
        rule="gradient",
        rule_settings={"gradient": {"step_size": 1.0}},
        layers=(("down_proj", 1, name.difficulty.layers),),
    )
