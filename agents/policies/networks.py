"""Feed-forward policies over layers as plain data, played without the library that trained them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hiedit_agents.named.checkpoints import POLICY, read_record
from hiedit_agents.policies.agent import FunctionPolicy, Mask, PolicyAgent
from hiedit_agents.policies.record import PolicyRecord, read_policy
from hiedit_agents.protocol import Observation
from hiedit_env.errors import CheckpointError, SettingsError

#: What may stand between linear layers.
ACTIVATIONS: Mapping[str, type[nn.Module]] = {
    kind.__name__: kind for kind in (nn.Tanh, nn.ReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Identity)
}
#: Head → outputs per layer: the log-odds of writing it, or a score each for leaving and writing it.
HEADS: Mapping[str, int] = {"coins": 1, "pairs": 2}


def describe(*modules: nn.Module, head: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A chain of linear layers and activations as data for :func:`.record.save_policy`.

    Args:
        modules: Run one after the other; what they contain, in the order it was put in, is the
            chain.
        head: How the last output is read, a key of :data:`HEADS`.

    Returns:
        ``policy`` and ``tensors`` of :func:`.record.save_policy`.

    Raises:
        SettingsError: another head, or a part that is no linear layer and no known activation.

    >>> describe(nn.Sequential(nn.Linear(3, 2), nn.Tanh()), head="coins")[0]
    {'head': 'coins', 'network': ['Linear', 'Tanh']}
    """
    if head not in HEADS:
        raise SettingsError(f"unknown head {head!r}; choose one of {', '.join(HEADS)}")
    parts = [part for module in modules for part in module.modules() if not [*part.children()]]
    tensors: dict[str, Tensor] = {}
    for place, part in enumerate(parts):
        if isinstance(part, nn.Linear):
            tensors |= {f"{place}.{name}": value for name, value in part.state_dict().items()}
        elif type(part) not in ACTIVATIONS.values():
            raise SettingsError(
                f"a network is kept for hiedit compare if it is made of Linear and "
                f"{', '.join(ACTIVATIONS)}; it holds {part}"
            )
    return {"head": head, "network": [type(part).__name__ for part in parts]}, tensors


class ChainPolicy:
    """What :func:`describe` described, as a function of one observation.

    Args:
        record: Of a policy whose actions are MultiBinary(L).

    Raises:
        CheckpointError: the tensors do not fit the description or the sizes.
    """

    def __init__(self, record: PolicyRecord) -> None:
        try:
            kinds: Sequence[str] = record.policy["network"]
            outputs = HEADS[record.policy["head"]]
            self.network = nn.Sequential(
                *(_part(kind, place, record.tensors) for place, kind in enumerate(kinds))
            )
            with torch.no_grad():
                found = self.network(torch.zeros(record.sizes.observation)).shape
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"the network in {record.folder} does not fit its description: {error!r}"
            ) from error
        if found != (outputs * record.sizes.layers,):
            raise CheckpointError(
                f"the network in {record.folder} has {tuple(found)} outputs; "
                f"{record.sizes.layers} layers need {outputs * record.sizes.layers}"
            )
        self.outputs = outputs

    @torch.no_grad()
    def __call__(self, observation: Observation, mask: Mask) -> NDArray[np.int8]:
        """L int8, the layers that are more probably written than not."""
        scores = self.network(torch.from_numpy(observation))
        if self.outputs == 2:
            scores = scores.view(-1, 2)[:, 1] - scores.view(-1, 2)[:, 0]
        layers: NDArray[np.int8] = (scores > 0).numpy().astype(np.int8)
        return layers


def load(folder: Path) -> PolicyAgent:
    """The agent of a policy that :func:`describe` described.

    Raises:
        CheckpointError: the folder holds none.
    """
    record = read_policy(folder, library_of(folder))
    if record.task.form != "layers":
        raise CheckpointError(
            f"{folder} holds a policy in the form {record.task.form!r}; networks choose 'layers'"
        )
    return PolicyAgent(record, FunctionPolicy(ChainPolicy(record)))


def library_of(folder: Path) -> str:
    """Which library trained the policy in a folder.

    Raises:
        CheckpointError: the folder holds none.
    """
    return str(read_record(folder, POLICY)["library"])


def _part(kind: str, place: int, tensors: Mapping[str, Tensor]) -> nn.Module:
    if kind != "Linear":
        return ACTIVATIONS[kind]()
    weight, bias = tensors[f"{place}.weight"], tensors.get(f"{place}.bias")
    outputs, inputs = weight.shape
    # Made without initial values, which would come from torch's global generator.
    layer = nn.Linear(inputs, outputs, bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer
