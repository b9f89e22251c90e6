"""Which matrices are the parts of an MLP: against the modules of real architectures."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from hiedit_env.model.mlps import candidate_mlps
from tests.support.models import HIDDEN, INNER, resident

GATED = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3")
PLAIN = ("gpt2", "gptj", "phi")


@pytest.mark.parametrize("model_type", [*GATED, *PLAIN])
def test_one_neuron_by_hand_is_what_the_mlp_loses_without_it(model_type: str) -> None:
    llm = resident(model_type)
    found = candidate_mlps(llm.model, llm.layers)
    assert [mlp.block for mlp in found] == [1, 2]
    mlp, neuron = found[0], 5
    assert (mlp.hidden, mlp.neurons) == (HIDDEN, INNER)
    assert (mlp.up is not None) == (model_type in GATED)
    parent = llm.model.get_submodule(llm.names[mlp.back].rpartition(".")[0])
    inputs = torch.randn(1, 4, HIDDEN, generator=torch.Generator().manual_seed(1))
    back = llm.layers[mlp.back].module
    inner: list[torch.Tensor] = []
    handle = back.register_forward_hook(lambda _m, args, _o: inner.append(args[0]))
    with torch.no_grad():
        parent(inputs)
        handle.remove()
        gate = inputs @ llm.weight(mlp.gate.layer)[:, mlp.gate.first + neuron]
        bias = getattr(llm.layers[mlp.gate.layer].module, "bias", None)
        strength = mlp.activation(gate if bias is None else gate + bias[neuron])
        if mlp.up is not None:
            strength = strength * (inputs @ llm.weight(mlp.up.layer)[:, mlp.up.first + neuron])
    torch.testing.assert_close(strength, inner[0][..., neuron])


def test_the_order_of_two_equal_matrices_is_found_by_running() -> None:
    llm = resident("llama")
    (mlp, _) = candidate_mlps(llm.model, llm.layers)
    assert llm.names[mlp.gate.layer].endswith("gate_proj")
    x = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(mlp.activation(x), F.silu(x))


def test_an_mlp_with_a_matrix_that_is_no_candidate_is_none() -> None:
    llm = resident("llama", matrices=("mlp.gate_proj", "mlp.down_proj"))
    assert candidate_mlps(llm.model, llm.layers) == ()


def test_half_precision() -> None:
    llm = resident("qwen3", dtype=torch.bfloat16)
    assert len(candidate_mlps(llm.model, llm.layers)) == 2


def test_a_module_that_cannot_be_run_by_itself_is_none_but_missing_memory_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    llm = resident("llama")
    first = llm.model.get_submodule("model.layers.1.mlp")

    def raises(error: Exception) -> None:
        def forward(*_: object) -> None:
            raise error

        monkeypatch.setattr(first, "forward", forward)

    raises(TypeError("forward() needs more"))
    assert [mlp.block for mlp in candidate_mlps(llm.model, llm.layers)] == [2]
    raises(MemoryError("no room"))
    with pytest.raises(MemoryError, match="no room"):
        candidate_mlps(llm.model, llm.layers)


def test_an_mlp_that_gives_something_else_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = resident("llama")
    first = llm.model.get_submodule("model.layers.1.mlp")
    own = first.forward
    monkeypatch.setattr(first, "forward", lambda x: 1.1 * own(x))
    assert [mlp.block for mlp in candidate_mlps(llm.model, llm.layers)] == [2]
