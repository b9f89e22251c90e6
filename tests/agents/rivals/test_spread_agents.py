"""MEMIT and AlphaEdit as agents: which matrices, what they need, and episodes on the tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from hiedit_agents.protocol import begin_episode
from hiedit_agents.registry import make_agent, spec_agent
from hiedit_agents.rivals import spread_agent
from hiedit_agents.rivals.memit import Memit
from hiedit_agents.rivals.spread import Spread, second_moments
from hiedit_agents.rivals.spread_agent import SpreadAgent
from hiedit_benchmarks.comparison.compare import compare
from hiedit_benchmarks.comparison.settings import CompareSettings
from hiedit_env.datasets.load import load_requests
from hiedit_env.envs.base import EditingEnv
from hiedit_env.errors import SettingsError
from hiedit_env.testing import assert_restores_bit_exact
from tests.agents.rivals.test_fine_tuning import play
from tests.support.models import all_bits, build_random, resident

#: The tiny model is written strongly, since its hidden states have 32 numbers only.
STRONG = (
    "dataset=tiny-facts,prompts=60,openings=0,clamp=5,search_steps=50,step_size=0.2,enough=0.02"
)
AGENTS = (f"memit,weight=1e-4,{STRONG}", f"alphaedit,threshold=9,ridge=0.01,{STRONG}")


#: Facts for which there is a value: only one block is left behind the one that is written.
FACTS = [load_requests("tiny-facts")[i] for i in (3, 5, 6)]


def make(num_edits: int = 3, **settings: Any) -> EditingEnv:
    env = gymnasium.make(
        "hiedit/LayerSelection-v1", num_edits=num_edits, retention_window=0, **settings
    ).unwrapped
    assert isinstance(env, EditingEnv)
    return env


@pytest.mark.parametrize("name", AGENTS)
def test_a_fact_is_answered_after_its_edit(name: str) -> None:
    env = make()
    infos = play(env, make_agent(name), FACTS)
    # Block 1's down projection; the last block's reaches no other token.
    assert [info["layers"].tolist() for info in infos] == [[0, 0, 1, 0, 0, 0]] * 3
    assert [info["metrics"]["answered"] for info in infos] == [True] * 3


@pytest.mark.parametrize("name", AGENTS)
def test_facts_of_one_step_are_answered_together(name: str) -> None:
    env = make(3, edits_per_step=3)
    (info,) = play(env, make_agent(name), FACTS)
    assert info["metrics"]["answered"]


@pytest.mark.parametrize("name", AGENTS)
def test_steps_go_back_bit_for_bit_and_the_next_episode_begins_unedited(name: str) -> None:
    env, agent = make(2), make_agent(name)
    before = all_bits(env.llm.model)
    observation, info = begin_episode(env, agent, 0)
    action = agent.select_action(observation, info)
    assert_restores_bit_exact(env, [action] * 2)
    env.step(action)
    assert all_bits(env.llm.model) != before
    begin_episode(env, agent, 1)
    assert all_bits(env.llm.model) == before
    low = env.episode.rule
    assert isinstance(low, Spread)
    assert low._metrics is low._first


def test_an_episode_depends_on_nothing_but_its_seed() -> None:
    prints = set()
    for _ in range(2):
        env = make(2)
        play(env, make_agent(AGENTS[1]))
        prints.add(env.llm.weights_fingerprint())
    assert len(prints) == 1


def test_agents_of_one_model_share_the_second_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Any] = []

    def counted(*arguments: Any) -> Any:
        taken.append(arguments)
        return second_moments(*arguments)

    monkeypatch.setattr(spread_agent, "second_moments", counted)
    env = make(1)
    for name in (*AGENTS, AGENTS[0]):
        make_agent(name).reset(env, 0)
    assert len(taken) == 1
    make_agent(AGENTS[0].replace("prompts=60", "prompts=50")).reset(env, 0)
    make_agent(AGENTS[0]).reset(make(1), 0)
    assert len(taken) == 3


def test_a_row_of_a_comparison_and_a_resumed_one(tmp_path: Path) -> None:
    settings = CompareSettings(model="tiny", num_edits=2, generation=())
    names = [f"{name.partition(',')[0]}={name}" for name in AGENTS]
    outcome = compare(settings, names, [0], tmp_path, progress=False)
    rows = {row["agent"]: row["metrics"] for row in outcome.rows}
    assert list(rows) == ["no-edit", "memit", "alphaedit"]
    for name in ("memit", "alphaedit"):
        better = (
            rows[name]["efficacy"]["token_accuracy"] - rows["no-edit"]["efficacy"]["token_accuracy"]
        )
        assert better >= 50
    again = compare(settings, names, [0], tmp_path, resume=True, progress=False)
    assert [row["metrics"] for row in again.rows] == [row["metrics"] for row in outcome.rows]


# -- which matrices -------------------------------------------------------------------------------


def chosen(agent: SpreadAgent, **settings: Any) -> list[str]:
    llm = resident(**settings)
    return [llm.names[i] for i in agent._layers(llm)]


def test_the_last_matrices_before_the_last_block() -> None:
    down = "model.layers.{}.mlp.down_proj"
    every = {"blocks": (0, 1, 2)}
    assert chosen(Memit(), **every) == [down.format(0), down.format(1)]
    assert chosen(Memit(blocks=1), **every) == [down.format(1)]
    assert chosen(Memit(blocks=[1, 0]), **every) == [down.format(0), down.format(1)]
    assert chosen(Memit(), model_type="gpt2", blocks=(0,)) == ["transformer.h.0.mlp.c_proj"]


def test_candidates_without_such_a_matrix_are_refused() -> None:
    for settings in ({"matrices": ("mlp.up_proj", "self_attn.o_proj")}, {"blocks": (2,)}):
        with pytest.raises(SettingsError, match=r"agent 'memit' writes into .* none among model"):
            chosen(Memit(), **settings)
    for blocks in ([0, 1, 2], [7], []):
        with pytest.raises(SettingsError, match=r"blocks=.* candidate layer: 0, 1$"):
            chosen(Memit(blocks=blocks), blocks=(0, 1, 2))


@pytest.mark.parametrize(
    ("model_type", "fits"), [("llama", True), ("gptj", True), ("gemma2", False)]
)
def test_a_model_with_a_norm_behind_its_mlps_is_refused(model_type: str, fits: bool) -> None:
    llm = resident(model_type, (0, 1), model=build_random(model_type))
    layers = Memit()._layers(llm)
    prompt = llm.encode("w5 w9 w4", "w7")
    bits = all_bits(llm.model)
    if fits:
        Memit()._check(llm, layers[-1], prompt)
    else:
        with pytest.raises(SettingsError, match="write straight to the residual stream"):
            Memit()._check(llm, layers[-1], prompt)
    assert all_bits(llm.model) == bits


def test_names_and_mistakes() -> None:
    memit = make_agent("memit,blocks=4:5,weight=30")
    identity = memit.identity  # type: ignore[attr-defined]
    assert (identity["blocks"], identity["weight"]) == ([4, 5], 30.0)
    assert identity["search"]["clamp"] == Memit().search.clamp
    for name, message in (
        ("memit,ridge=3", "no setting|unknown|ridge"),
        ("memit,weight=0", "weight must be a positive number"),
        ("memit,prior=0", "prior must be a positive number"),
        ("memit,momentum=1", "momentum must be a number in"),
        ("memit,openings=9", "openings must be at most"),
        ("alphaedit,kl_factor=-1", "kl_factor must be a number ≥ 0"),
        ("alphaedit,steps=0", "steps must be ≥ 1"),
        ("alphaedit,threshold=0", "threshold must be a positive number"),
        ("alphaedit,ridge=-1", "ridge must be a positive number"),
    ):
        with pytest.raises(SettingsError, match=message):
            make_agent(name)
    with pytest.raises(SettingsError, match="has no levels, so nothing to train"):
        spec_agent("memit")
    with pytest.raises(SettingsError, match="must be reset before it can act"):
        memit.select_action(np.zeros(1, np.float32), {})
    with (
        gymnasium.make("hiedit/StepSize-v1", num_edits=1) as other,
        pytest.raises(SettingsError, match="LayerSelection"),
    ):
        memit.reset(other, 0)
