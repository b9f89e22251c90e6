"""The edits as a LoRA adapter in PEFT's format: an edit is one already, so no fitting is needed.

A recorded update changes a weight, read as d_in × d_out, by leftᵀ right, so ``lora_A`` is left and
``lora_B`` is rightᵀ, with ``lora_alpha`` equal to ``r``. The updates of all edits stand one below
the other: exact while their summed rank is at most that of the matrix. With ``max_rank`` the sum is
cut to the best approximation of that rank, and the error in weights and in answers is measured.
Layers of a smaller rank are filled up with zeros, since not every server reads a rank per layer.

PEFT itself is not needed to write it. The files: ``adapter_config.json``,
``adapter_model.safetensors``, ``README.md`` and ``hiedit.json``, the report.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F

from hiedit_agents.editing.ledger import Ledger
from hiedit_agents.editing.low_rank_sum import LayerSum
from hiedit_env.files import write_bytes
from hiedit_env.resident.weights import WeightSnapshot

CONFIG, WEIGHTS, REPORT = "adapter_config.json", "adapter_model.safetensors", "hiedit.json"


@dataclass(frozen=True, slots=True)
class AdapterReport:
    """How well an adapter holds the edits.

    Args:
        rank: Its rank r.
        exact_rank: The rank at which nothing is cut.
        weight_error: ‖change − adapter‖_F / ‖change‖_F over all layers; 0 where nothing was cut.
        facts: Number of facts that were asked.
        given: How many of them the edited model gives.
        given_by_adapter: How many the model with the adapter gives.
        agreement: Agreement on control prompts of the edited model with the unedited one, 0 to 1;
            None where it was not measured.
        agreement_by_adapter: The same of the model with the adapter.
    """

    rank: int
    exact_rank: int
    weight_error: float
    facts: int
    given: int
    given_by_adapter: int
    agreement: float | None
    agreement_by_adapter: float | None

    @property
    def is_exact(self) -> bool:
        """Whether nothing was cut."""
        return self.rank >= self.exact_rank

    @property
    def text(self) -> str:
        """One line."""
        cut = "exact" if self.is_exact else f"relative error {self.weight_error:.2g}"
        return (
            f"rank {self.rank} of {self.exact_rank} ({cut}); of {self.facts} facts the edited "
            f"model gives {self.given}, the adapter {self.given_by_adapter}"
        )


def change_of(sums: Mapping[int, LayerSum], transposed: Sequence[bool]) -> WeightSnapshot:
    """The weights' changes that an adapter stands for.

    Args:
        sums: Layer index → its change.
        transposed: Per layer whether its weight is stored as d_out × d_in.
    """
    changes: dict[int, Tensor | None] = dict.fromkeys(range(len(transposed)))
    for i, part in sums.items():
        dense = part.factors.dense()
        changes[i] = dense.mT.contiguous() if transposed[i] else dense
    return WeightSnapshot(changes)


def sizes(sums: Mapping[int, LayerSum]) -> tuple[int, int, float]:
    """Rank, the rank that would be exact, and the relative error over all layers."""
    rank = max(len(part.factors.left) for part in sums.values())
    needed = max(part.needed for part in sums.values())
    error = sum(part.error**2 for part in sums.values()) ** 0.5
    norm = sum(part.norm**2 for part in sums.values()) ** 0.5
    return rank, needed, error / norm if norm else 0.0


def write_adapter(
    folder: Path, ledger: Ledger, sums: Mapping[int, LayerSum], report: AdapterReport, card: str
) -> None:
    """Writes the files of an adapter.

    Args:
        folder: Made here; its parent exists.
        ledger: Whose base model it is for.
        sums: Layer index → its change; at least one.
        report: See :class:`AdapterReport`.
        card: Text of ``README.md``.

    Raises:
        OutputError: it cannot be written.
    """
    folder.mkdir()
    base, rank = ledger.base, report.rank
    tensors: dict[str, Tensor] = {}
    for i, part in sums.items():
        left, right = part.factors.left, part.factors.right
        missing = rank - len(left)
        name = f"base_model.model.{base.layers[i].name}"
        tensors[f"{name}.lora_A.weight"] = F.pad(left, (0, 0, 0, missing)).contiguous()
        tensors[f"{name}.lora_B.weight"] = F.pad(right, (0, 0, 0, missing)).mT.contiguous()
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.source or base.model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [base.layers[i].name for i in sums],
        # Conv1D stores d_in × d_out.
        "fan_in_fan_out": not all(base.layers[i].is_transposed for i in sums),
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }
    write_bytes(folder / WEIGHTS, save(tensors, {"format": "pt"}))
    for name, value in ((CONFIG, config), (REPORT, asdict(report))):
        write_bytes(folder / name, (json.dumps(value, indent=2) + "\n").encode())
    write_bytes(folder / "README.md", card.encode())
