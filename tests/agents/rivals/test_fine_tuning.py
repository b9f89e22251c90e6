"""Fine-tuning rivals against autograd on the model's own weights, and what they write when."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from hiedit_agents.protocol import begin_episode
from hiedit_agents.registry import make_agent, spec_agent
from hiedit_agents.rivals.descent import Descent, chosen_layer, references
from hiedit_agents.rivals.fine_tuning import BreadthFirst, PenalisedFineTuning
from hiedit_env.datasets.load import load_requests
from hiedit_env.datasets.requests import Request
from hiedit_env.envs.base import EditingEnv
from hiedit_env.errors import SettingsError
from hiedit_env.evaluation.unedited import UneditedModel
from hiedit_env.model.tokenization import EncodedPrompt
from hiedit_env.resident.resident import ResidentLLM
from tests.support.models import PROMPTS, all_bits, resident

DOWN = 5


def make(num_edits: int = 4) -> EditingEnv:
    env = gymnasium.make(
        "hiedit/LayerSelection-v1", num_edits=num_edits, retention_window=0
    ).unwrapped
    assert isinstance(env, EditingEnv)
    return env


def finish(env: EditingEnv, agent: Any, info: Any, observation: Any) -> list[dict[str, Any]]:
    """Plays to the end; the information of every step."""
    infos, ended = [], False
    while not ended:
        observation, _, ended, _, info = env.step(agent.select_action(observation, info))
        infos.append(info)
    return infos


def play(env: EditingEnv, agent: Any, requests: list[Request] | None = None) -> list[Any]:
    options = None if requests is None else {"requests": requests}
    observation, info = begin_episode(env, agent, 0, options=options)
    return finish(env, agent, info, observation)


def own_gradient(
    llm: ResidentLLM, layer: int, prompts: tuple[EncodedPrompt, ...]
) -> tuple[float, torch.Tensor]:
    """Loss and gradient d_in × d_out by autograd on the model's own weight, prompt by prompt."""
    weight = llm.layers[layer].module.weight
    weight.requires_grad_(True)
    losses = []
    for p in prompts:
        ids = torch.tensor([[*p.prompt_ids, *p.answer_ids]])
        rows = llm.model(ids).logits[0, len(p.prompt_ids) - 1 : -1]
        losses.append(F.cross_entropy(rows, torch.tensor(p.answer_ids)))
    loss = torch.stack(losses).mean()
    (gradient,) = torch.autograd.grad(loss, weight)
    weight.requires_grad_(False)
    transposed = llm.layers[layer].is_transposed
    return float(loss.detach()), gradient.mT if transposed else gradient


def test_a_step_is_adams_along_the_gradient_of_the_weight() -> None:
    llm = resident(max_batch_tokens=8)  # two buckets
    before = all_bits(llm.model)
    loss, gradient = own_gradient(llm, DOWN, PROMPTS)
    descent = Descent(llm, [DOWN], 1e-3)
    found, right = descent.step(PROMPTS)
    assert found == pytest.approx(loss, rel=1e-4)
    assert not right
    # Adam's first step is the learning rate times the gradient's sign.
    large = gradient.abs() > 1e-5
    assert large.float().mean() > 0.9
    change = descent.result()[DOWN]
    torch.testing.assert_close(change[large], -1e-3 * gradient.sign()[large], rtol=1e-2, atol=1e-6)
    assert all_bits(llm.model) == before


def test_no_step_where_the_loss_is_low_enough() -> None:
    llm = resident()
    descent = Descent(llm, [DOWN], 1e-3, enough=1e9)
    descent.step(PROMPTS)
    assert not descent.result()[DOWN].any()


def test_the_penalty_alone_holds_the_model_to_the_unedited_one() -> None:
    llm = resident()
    others = references(UneditedModel(llm), PROMPTS)
    free, held = Descent(llm, [DOWN], 1e-2), Descent(llm, [DOWN], 1e-2)
    for _ in range(20):
        free.step(PROMPTS[:1])
        held.step(PROMPTS[:1], others, 100.0)
    divergence = {}
    for name, descent in (("free", free), ("held", held)):
        rows = descent._log_probs(list(others))
        pairs = zip(rows, others.values(), strict=True)
        found = [F.kl_div(r, o, reduction="batchmean", log_target=True) for r, o in pairs]
        divergence[name] = float(torch.stack(found).mean().detach())
    assert divergence["held"] < 0.2 * divergence["free"]


def test_the_layer_by_hand() -> None:
    # Three blocks: 22/32 of the depth is 2.06, so block 2; there the down projection.
    llm = resident(blocks=(0, 1, 2))
    assert llm.names[chosen_layer(llm, None, "x")] == "model.layers.2.mlp.down_proj"
    assert chosen_layer(llm, 4, "x") == 4
    for wrong in (-1, 9, "a"):
        with pytest.raises(SettingsError, match="index of a candidate, 0 to 8"):
            chosen_layer(llm, wrong, "x")  # type: ignore[arg-type]


def test_breadth_first_writes_all_facts_at_once_into_one_layer() -> None:
    env, agent = make(4), BreadthFirst(learning_rate=1e-2, epochs=40)
    infos = play(env, agent)
    written = [info["layers"].tolist() for info in infos]
    assert sum(map(sum, written)) == 1
    assert env.llm.names[int(np.argmax(infos[0]["layers"]))] == "model.layers.2.mlp.down_proj"
    # All are given at the end, though only the first step wrote.
    for fact in env.episode.facts:
        assert env.llm.read(fact.prompt).answered
    again = make(4)
    play(again, BreadthFirst(learning_rate=1e-2, epochs=40))
    assert again.llm.weights_fingerprint() == env.llm.weights_fingerprint()


def test_a_first_fact_that_is_known_does_not_keep_it_from_writing() -> None:
    requests = load_requests("tiny-facts")[:3]
    known = next(
        Request(prompt=r.prompt, answer=r.old_answer, subject=r.subject)
        for r in requests
        if r.old_answer is not None
    )
    env, agent = make(), BreadthFirst(learning_rate=1e-2)
    infos = play(env, agent, [known, *requests[1:]])
    assert [int(info["layers"].sum()) for info in infos] == [0, 1, 0]


def test_the_next_episode_trains_anew() -> None:
    env, agent = make(2), BreadthFirst(epochs=1)
    play(env, agent)
    first = env.llm.change(DOWN)
    play(env, agent, load_requests("tiny-facts")[50:52])
    second = env.llm.change(DOWN)
    assert first is not None
    assert second is not None
    assert not torch.equal(first, second)


def test_fact_by_fact_until_it_is_given() -> None:
    env, agent = make(3), PenalisedFineTuning(learning_rate=1e-2, dataset="tiny-facts", probes=2)
    infos = play(env, agent)
    assert all(info["metrics"]["answered"] for info in infos)
    assert [np.flatnonzero(info["layers"]).tolist() for info in infos] == [[DOWN]] * 3


def test_no_penalty_draws_no_prompts() -> None:
    env, agent = make(1), PenalisedFineTuning(weight=0.0, dataset="tiny-facts", steps=1)
    play(env, agent)
    assert len(agent._unedited) == 0


def test_names_and_mistakes() -> None:
    assert make_agent("locft-bf,epochs=3").identity["epochs"] == 3  # type: ignore[attr-defined]
    assert make_agent("fine-tuning-kl,weight=0").name == "fine-tuning-kl"
    for name, message in (
        ("locft-bf,epoch=3", "did you mean 'epochs'"),
        ("locft-bf,epochs=0", "epochs must be ≥ 1"),
        ("locft-bf,learning_rate=-1", "learning_rate must be a positive number"),
        ("fine-tuning-kl,weight=-1", "weight must be a number ≥ 0"),
    ):
        with pytest.raises(SettingsError, match=message):
            make_agent(name)
    with pytest.raises(SettingsError, match="has no levels, so nothing to train"):
        spec_agent("locft-bf")
    with pytest.raises(SettingsError, match="must be reset before it can act"):
        BreadthFirst().select_action(np.zeros(1, np.float32), {})
