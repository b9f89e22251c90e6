"""The fields of ``agent.json`` for each kind of agent, checked strictly."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from hiedit_env.errors import CheckpointError

Count = Annotated[int, Field(ge=0)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Part(BaseModel):
    """A JSON object: nothing is converted, and fields beyond the declared ones are kept."""

    model_config = ConfigDict(strict=True, extra="allow")


class Tensors(_Part):
    """The file of trained numbers."""

    sha256: Digest


class HighLevel(_Part):
    """The high level by name, with its settings."""

    name: str
    settings: dict[str, Any]


class LowLevel(_Part):
    """The low level by name, with its settings; the environment's own rule where None."""

    name: str | None
    settings: dict[str, Any]


class Model(_Part):
    """The model that an agent fits."""

    model_type: str
    layers: list[str]
    shapes: list[Annotated[list[Count], Field(min_length=2, max_length=2)]]
    tokenizer: Annotated[list[Count], Field(min_length=1)]
    sample: list[list[float]] = []


class Training(_Part):
    """How an agent was trained."""

    fact_hashes: str = ""


class LevelsTraining(Training):
    """How ``hiedit train`` trained an agent."""

    run: dict[str, Any]
    settings: dict[str, Any]
    facts: dict[str, Any]


class Levels(_Part):
    """An agent of two levels."""

    kind: Literal["levels"]
    name: str
    high: HighLevel
    low: LowLevel
    max_steps_per_edit: Annotated[int, Field(ge=1)] | None
    train: dict[str, Any]
    source: str
    model_name: str
    model: Model
    training: LevelsTraining
    log: dict[str, float] | list[dict[str, float]]
    values: dict[str, Any]
    tensors: Tensors


class TaskRecord(_Part):
    """What a policy was trained on, see :class:`hiedit_agents.policies.task.Task`."""

    form: str
    id: str
    env: dict[str, Any]
    options: dict[str, Any]


class SizesRecord(_Part):
    """What a policy was made for, see :class:`hiedit_agents.policies.task.Sizes`."""

    observation: Count
    layers: Count
    names: list[str]


class PolicyOfLibrary(_Part):
    """A policy of an RL library."""

    kind: Literal["policy"]
    library: str
    algorithm: str
    task: TaskRecord
    sizes: SizesRecord
    policy: dict[str, Any]
    training: Training
    tensors: Tensors


class SharedTraining(Training):
    """What a shared router learned from."""

    worlds: list[str]


class Shared(_Part):
    """A router with one network for all layers, see :mod:`hiedit_agents.bandits.shared_agent`."""

    kind: Literal["shared"]
    features: list[str]
    hidden: Annotated[int, Field(ge=1)]
    training: SharedTraining
    tensors: Tensors


_RECORD: TypeAdapter[Any] = TypeAdapter(
    Annotated[Levels | PolicyOfLibrary | Shared, Field(discriminator="kind")]
)


def check_record(file: Path, record: Mapping[str, Any]) -> None:
    """Checks the fields of a record.

    Args:
        file: How the message calls it.
        record: As read from JSON.

    Raises:
        CheckpointError: a field is missing or of the wrong type; one line that names the first one,
            and how many more there are.
    """
    try:
        _RECORD.validate_python(dict(record))
    except ValidationError as error:
        found = error.errors()
        # The first place names the kind, which is no field.
        where = ".".join(str(place) for place in found[0]["loc"][1:]) or "kind"
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise CheckpointError(
            f"{file}: field {where!r}: {found[0]['msg']}{more}; copy the folder again, or train "
            "the agent into another one"
        ) from None
