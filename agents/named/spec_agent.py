"""An agent that is built from its parts when it meets a model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
from numpy.typing import NDArray

from hiedit_agents.hierarchy.options import HierarchicalAgent, layer_selection
from hiedit_agents.named.checkpoints import (
    check_fits,
    part,
    read_record,
    read_state,
    trained_facts,
    weights_of,
)
from hiedit_agents.named.fitting import SHIPPED, find_shipped
from hiedit_agents.named.presets import PRESETS
from hiedit_agents.named.spec import AgentSpec
from hiedit_agents.protocol import FixedAgent, Observation, Trainable
from hiedit_env.errors import CheckpointError, SettingsError
from hiedit_env.resident.resident import ResidentLLM
from hiedit_env.rules.layer_choice import SIZELESS

#: Arguments of training that one level's preset sets for that level alone.
_OF_THE_HIGH = frozenset({"train_high", "high_learning_rate"})
_OF_THE_LOW = frozenset(
    {"train_low", "low_learning_rate", "future_damage", "future_damage_prompts"}
)
#: Arguments that parameters were trained for.
STRUCTURE = frozenset(
    {
        *("form", "network", "rank", "blocks", "keys", "gradients"),
        *("hidden", "embedding", "rule", "size", "normalize"),
    }
)

#: Belongs to the low level, though it is no argument of it.
HORIZON = "max_steps_per_edit"


def shipped(name: str, model: str) -> Path | None:
    """Folder of the trained agent that ships and fits a model; None if there is none."""
    found = find_shipped(name, model)
    return None if found is None else found.folder


def _check(spec: AgentSpec, folder: Path | None, **levels: bool) -> None:
    """Refuses settings that neither the spec's levels take nor those of an agent that ships.

    What ships under the name of a preset may have other levels than the preset, which is how such
    an agent is trained.
    """
    try:
        spec.check(**levels)
    except SettingsError as error:
        if folder is not None or spec.name not in PRESETS:
            raise
        given = _given(spec)
        for place in sorted(SHIPPED.glob(f"{spec.name}-*")):
            own = AgentSpec.from_json(read_record(place))
            try:
                replace(own, high_settings=given[0], low_settings=given[1]).check(**levels)
            except SettingsError as refused:
                # A wrong value is of a setting that these levels have, and the spec's have not.
                if refused.__cause__ is not None and error.__cause__ is None:
                    raise
                continue
            return
        raise


def _given(spec: AgentSpec) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of the high and of the low level that were given by name."""
    high = {k: v for k, v in spec.high_settings.items() if f"high.{k}" in spec.given}
    low = {k: v for k, v in spec.low_settings.items() if f"low.{k}" in spec.given}
    return high, low


class SpecAgent(FixedAgent):
    """An agent that is built from its parts when it meets a model.

    Args:
        name: How it is called in tables and files.
        high, low: Spec of which the high and the low level are taken, and the folder with their
            trained parameters (None: as the spec makes them).
        layers_per_edit: Overrides the high level's K, unless that is taken from a folder.

    Raises:
        CheckpointError: a folder that is no trained agent.
        SettingsError: arguments that a learned level does not take.
    """

    def __init__(
        self,
        name: str,
        high: tuple[AgentSpec, Path | None],
        low: tuple[AgentSpec, Path | None],
        layers_per_edit: int | None = None,
    ) -> None:
        self.name = name
        spec, self._high_folder = high
        self._high = spec if self._high_folder else spec.with_layers_per_edit(layers_per_edit)
        self._low, self._low_folder = low
        # Of each part only one level is taken.
        _check(self._high, self._high_folder, low=False)
        _check(self._low, self._low_folder, high=False)
        self._built: tuple[ResidentLLM, HierarchicalAgent] | None = None

    @property
    def high_part(self) -> tuple[AgentSpec, Path | None]:
        """What the high level is taken from."""
        return self._high, self._high_folder

    @property
    def low_part(self) -> tuple[AgentSpec, Path | None]:
        """What the low level is taken from."""
        return self._low, self._low_folder

    @property
    def spec(self) -> AgentSpec:
        """The whole agent's spec."""
        return AgentSpec(
            name=self.name,
            high=self._high.high,
            low=self._low.low,
            high_settings=self._high.high_settings,
            low_settings=self._low.low_settings,
            max_steps_per_edit=self._low.max_steps_per_edit,
            # Whether and how a level is trained is not for the other one's preset to say.
            train={
                **{k: v for k, v in self._low.train.items() if k not in _OF_THE_HIGH},
                **{k: v for k, v in self._high.train.items() if k not in _OF_THE_LOW},
            },
            source=self._high.source if self._high is self._low else "",
        )

    @property
    def keeps_size(self) -> str | None:
        """Why ``layers_per_edit`` changes nothing about it; None if it does."""
        if self._high_folder is not None:
            return f"the high level of {self._high_folder} keeps the size it was trained with"
        if self._high.high in SIZELESS:
            return f"the high level {self._high.high!r} has no such setting"
        return None

    @property
    def identity(self) -> dict[str, Any]:
        """What makes two agents of one name different: their settings and trained weights."""
        folders = dict.fromkeys(f for f in (self._high_folder, self._low_folder) if f is not None)
        weights = [weights_of(read_record(folder)) for folder in folders]
        spec = self.spec.to_json()
        return {
            "high": spec["high"],
            "low": spec["low"],
            "max_steps_per_edit": spec["max_steps_per_edit"],
            "weights": weights,
        }

    def candidate_layers(self, model: str) -> list[str] | None:
        """The layers it was trained for on a model of this name; None if it takes any."""
        for spec, folder in ((self._high, self._high_folder), (self._low, self._low_folder)):
            found = folder or shipped(spec.name, model)
            if found is not None and (folder is not None or spec.learns):
                layers: list[str] = read_record(found)["model"]["layers"]
                return layers
        return None

    def trained_folders(self, model: str) -> dict[Path, str]:
        """Folders of the trained numbers that it uses on a model, each with the reason."""
        found: dict[Path, str] = {}
        for spec, folder in ((self._high, self._high_folder), (self._low, self._low_folder)):
            if folder is not None:
                found[folder] = "it was named"
            elif spec.name in PRESETS and spec.learns:
                fit = find_shipped(spec.name, model)
                if fit is not None:
                    found[fit.folder] = fit.why
        return found

    def training_facts(self, model: str, *, trained: bool = True) -> frozenset[str]:
        """Hashes of the facts that its learned levels were trained on, as far as records say.

        Args:
            model: Name of the model it is for.
            trained: As for :meth:`build`.
        """
        found: frozenset[str] = frozenset()
        for own, folder, learned in (
            (self._high, self._high_folder, self._high.learned_high),
            (self._low, self._low_folder, self._low.learned_low),
        ):
            _, place = self._resolved(own, folder, model, trained)
            if learned and place is not None:
                found |= trained_facts(read_record(place))
        return found

    def seeded(self, seed: int) -> SpecAgent:
        """The same agent with initial values drawn from a seed, where none was given."""
        high, low = self._high, self._low
        if self._high_folder is None:
            high = high.with_seed(seed, high=True, low=high is low and self._low_folder is None)
        if low is self._high:
            low = high
        elif self._low_folder is None:
            low = low.with_seed(seed, low=True)
        return SpecAgent(self.name, (high, self._high_folder), (low, self._low_folder))

    def acting_with(self, layers_per_edit: int | None) -> SpecAgent:
        """The same agent with another K, also of a trained high level; its name goes before it.

        Raises:
            SettingsError: the number of layers follows from what it has learned.
        """
        if layers_per_edit is None or self._high.high in SIZELESS:
            return self
        if "high.layers_per_edit" in self._high.given:
            return self
        if self._high.high_settings.get("size") == "learned":
            raise SettingsError(
                f"agent {self.name!r} has learned how many layers to choose, so layers_per_edit="
                f"{layers_per_edit} would change nothing; leave it out"
            )
        high = self._high.with_layers_per_edit(layers_per_edit)
        low = high if self._low is self._high else self._low
        return SpecAgent(self.name, (high, self._high_folder), (low, self._low_folder))

    def with_low_options(
        self, max_steps_per_edit: int | None, step_size: float | None, update_rule: str | None
    ) -> SpecAgent:
        """The same agent with what is given for all agents; its name goes before it.

        Raises:
            SettingsError: an update rule, where the low level comes with the agent.
        """
        low = self._low
        bundled = self._low_folder is not None or low.name in PRESETS
        if update_rule is not None and low.low is not None and bundled:
            raise SettingsError(
                f"agent {self.name!r} has a low level of its own, so update_rule={update_rule!r} "
                f"would change nothing; leave it out, or name {low.high}+{update_rule}"
            )
        given, settings, horizon = set(low.given), dict(low.low_settings), low.max_steps_per_edit
        if max_steps_per_edit is not None and HORIZON not in given:
            horizon = max_steps_per_edit
            given.add(HORIZON)
        if step_size is not None and low.low is not None and "low.step_size" not in given:
            settings["step_size"] = step_size
            given.add("low.step_size")
        spec = replace(
            low, low_settings=settings, max_steps_per_edit=horizon, given=frozenset(given)
        )
        high = spec if self._high is low else self._high
        return SpecAgent(self.name, (high, self._high_folder), (spec, self._low_folder))

    def with_low_settings(self, **settings: Any) -> SpecAgent:
        """The same agent with other arguments of its low level."""
        spec = replace(
            self._low,
            low_settings={**self._low.low_settings, **settings},
            given=self._low.given | {f"low.{name}" for name in settings},
        )
        high = spec if self._high is self._low else self._high
        return SpecAgent(self.name, (high, self._high_folder), (spec, self._low_folder))

    def build(
        self, llm: ResidentLLM, model: str = "", *, trained: bool = True
    ) -> HierarchicalAgent:
        """The agent for a model.

        Args:
            llm: The model.
            model: Its name, to find the weights that ship for it.
            trained: If False, parameters of named agents are left as they are made, for training.

        Raises:
            CheckpointError: its trained parameters do not fit the model.
            SettingsError: settings that do not fit, or a learned agent without trained parameters.
        """
        high_spec, high_folder = self._resolved(self._high, self._high_folder, model, trained)
        low_spec, low_folder = self._resolved(self._low, self._low_folder, model, trained)
        # Only now is it known which levels ship for the model under the name of a preset.
        if self._high.name in PRESETS:
            high_spec.check(low=False)
        if self._low.name in PRESETS:
            low_spec.check(high=False)
        high, low = high_spec.make_high(llm), low_spec.make_low(llm, model)
        for level, kind, spec, found in (
            (high, "high", self._high, high_folder),
            (low, "low", self._low, low_folder),
        ):
            if not isinstance(level, Trainable):
                continue
            if found is not None:
                record = read_record(found)
                check_fits(found, record, llm)
                try:
                    level.load_state_dict(part(read_state(found, record, llm.device), kind))
                except (RuntimeError, KeyError, TypeError, ValueError, OverflowError) as error:
                    raise CheckpointError(
                        f"the {kind} level in {found} does not fit its own settings: {error}"
                    ) from error
            elif spec.name in PRESETS and trained:
                raise SettingsError(
                    f"agent {self.name!r} has to be trained, and no trained one ships for model "
                    f"{model!r}: run 'hiedit train {spec.name} --model … --out DIR' and give DIR "
                    "in its place"
                )
        return HierarchicalAgent(self.name, high, low, low_spec.max_steps_per_edit)

    @staticmethod
    def _resolved(
        spec: AgentSpec, folder: Path | None, model: str, trained: bool
    ) -> tuple[AgentSpec, Path | None]:
        """Settings and folder that count: those of the agent that ships, for a named one.

        What ships was trained with settings of its own, which a preset may have left since; only
        arguments that were given by name go before them.
        """
        preset = PRESETS.get(spec.name)
        found = shipped(spec.name, model) if preset and trained and folder is None else None
        if preset is None or found is None:
            return spec, folder
        own = AgentSpec.from_json(read_record(found))
        fixed = sorted(given for given in spec.given if given.rpartition(".")[2] in STRUCTURE)
        if fixed:
            raise SettingsError(
                f"{', '.join(fixed)} of the agent {spec.name!r} that ships for {model} was fixed "
                "when it was trained; train one of your own, or give its folder"
            )
        high, low = _given(spec)
        horizon = (spec if HORIZON in spec.given else own).max_steps_per_edit
        return replace(
            own,
            high_settings={**own.high_settings, **high},
            low_settings={**own.low_settings, **low},
            max_steps_per_edit=horizon,
        ), found

    def reset(self, env: gym.Env[Any, Any], seed: int) -> None:
        """Builds the agent for the environment's model, once, and makes it ready for an episode."""
        inner = layer_selection(env, self.name)
        if self._built is None or self._built[0] is not inner.llm:
            self._built = inner.llm, self.build(inner.llm, inner.model_name)
        self._built[1].reset(env, seed)

    def select_action(self, observation: Observation, info: dict[str, Any]) -> NDArray[Any]:
        """L int8, the layers for the present fact."""
        if self._built is None:
            raise SettingsError(f"agent {self.name!r} must be reset before it can act")
        return self._built[1].select_action(observation, info)
